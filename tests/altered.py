"""A worker process with something in it changed, without a word of that in the product."""

import ast
from pathlib import Path
from textwrap import indent

from tests.worker_process import ROOT

FAILED = 97
"""Exit code of a process in which the change itself failed: without it nothing would be tested."""


def altered(directory: Path, code: str) -> dict[str, str]:
    """Settings for a `WorkerProcess` that runs this code before anything of its own; `directory` gets a file.

    The interpreter imports `sitecustomize` at its start, from wherever it finds it first. What the code sets in
    a module or class must be there already.
    """
    folder = directory / "altered"
    folder.mkdir(exist_ok=True)
    body = ast.unparse(ast.fix_missing_locations(_Known().visit(ast.parse(code))))
    (folder / "sitecustomize.py").write_text(
        "try:\n"
        f"{indent(body, '    ')}\n"
        "except BaseException:\n"
        "    import os, traceback\n"
        "    traceback.print_exc()\n"
        f"    os._exit({FAILED})\n"
    )
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


class _Known(ast.NodeTransformer):
    """Reads every attribute before it is set."""

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        reads = [
            ast.Expr(ast.Attribute(target.value, target.attr, ast.Load()))
            for target in node.targets
            if isinstance(target, ast.Attribute)
        ]
        return [*reads, node]
