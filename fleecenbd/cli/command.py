"""The parser's command, less forgiving: an option that is given twice is refused.

By habit the last one wins. A session's name, or a socket's path, that was typed and silently
dropped would be missed when it is too late.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand


class StrictCommand(TyperCommand):
    """Each option at most once, unless it makes a list."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the parser does; raises the parser's usage error for an option given twice."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        seen: set[Any] = set()
        for parameter in order:
            is_option = parameter.param_type_name == "option"
            if is_option and parameter in seen and not parameter.multiple:
                name = max(parameter.opts, key=len)
                raise typer.BadParameter("it is given twice; give it once", param_hint=name)
            seen.add(parameter)
        return super().parse_args(ctx, args)
