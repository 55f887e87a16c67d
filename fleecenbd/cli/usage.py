"""What the parser says of a wrong command line, in one line that names the help."""

from __future__ import annotations


def usage_text(error: Exception) -> str:
    """The line; ``error``: the parser's own."""
    text = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
    text = text.replace("Value error, ", "")  # how the parser's own library begins a cause
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "fleecenbd"
    is_no_command = text.startswith("No such command")
    helps = ["fleecenbd --help"]
    if " " in path:
        helps.append(f"{path} --help")
    elif not is_no_command:
        helps.append("fleecenbd serve --help")
    if is_no_command and path.endswith(" session") and "'start'" in text:
        text = "No such command 'start'. Did you mean 'begin'?"
    text += "" if text.endswith("?") else ";"
    return f"{text} see {', '.join(helps)}"
