"""Functions of the code that pages and drawings name: are they there?"""

import ast
from pathlib import Path

CODE = Path(__file__).parents[1] / "fleecenbd"


def is_function(name: str) -> bool:
    """Is ``[ROOM.]MODULE.[CLASS.]FUNCTION`` a function of the code, in one module only?"""
    for count in (1, 2):  # how many words are the module's
        words = name.split(".")
        found = list(CODE.glob("/".join(["*"] * (2 - count) + words[:count]) + ".py"))
        if len(found) == 1 and function_text(found[0], ".".join(words[count:])) is not None:
            return True
    return False


def function_text(module: Path, name: str) -> str | None:
    """The source of ``[CLASS.]FUNCTION`` of a module, None if there is no such function."""
    text = module.read_text()
    node: ast.AST = ast.parse(text)
    for word in name.split("."):
        children = getattr(node, "body", [])
        found = [child for child in children if getattr(child, "name", None) == word]
        if not found:
            return None
        node = found[0]
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    return ast.get_source_segment(text, node)
