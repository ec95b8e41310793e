"""Makes the stubs in cluster/rpc/easel from proto/: `python -m cluster.rpc.generate [--check]`.

protoc writes absolute imports (`from easel.v1 import ...`); they are moved under cluster.rpc here, because a
package of Easel's own must not claim a top-level name besides `cluster` and `deployments`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROTO_DIR = REPOSITORY / "proto"
STUB_DIR = REPOSITORY / "cluster" / "rpc" / "easel"
PACKAGE = "cluster.rpc"

_IMPORT = re.compile(r"^(from|import) easel\.", re.MULTILINE)
_INIT = '"""Generated from proto/ by `make proto`: do not edit."""\n'


class GenerateError(Exception):
    """protoc or one of its plugins is missing or refused the files; it has printed why."""


def generate(target: Path) -> None:
    """Write all stubs into the new folder `target`. Raises GenerateError; the folder is then incomplete."""
    with tempfile.TemporaryDirectory() as scratch:
        _run_protoc(Path(scratch))
        for source in sorted(Path(scratch, "easel").rglob("*.py*")):
            path = target / source.relative_to(Path(scratch, "easel"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_IMPORT.sub(rf"\1 {PACKAGE}.easel.", source.read_text()))
    for folder in [target, *sorted(p for p in target.rglob("*") if p.is_dir())]:
        (folder / "__init__.py").write_text(_INIT)


def _run_protoc(out: Path) -> None:
    try:
        # A developer's tool, absent where Easel only runs, and without type information.
        import grpc_tools  # type: ignore[import-untyped]  # noqa: PLC0415
        from grpc_tools import protoc  # noqa: PLC0415
    except ImportError:
        raise GenerateError("grpcio-tools is not installed: run `make venv`") from None
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = [str(path.relative_to(PROTO_DIR)) for path in sorted(PROTO_DIR.rglob("*.proto"))]
    plugins = [f"--plugin=protoc-gen-{name}={_plugin(name)}" for name in ("mypy", "mypy_grpc")]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{PROTO_DIR}", f"-I{well_known}", *plugins, *_quiet(outputs), *sources]):
        raise GenerateError("protoc failed")


def _quiet(outputs: list[str]) -> list[str]:
    return [o.replace("_out=", "_out=quiet:") if o.startswith("--mypy") else o for o in outputs]


def _plugin(name: str) -> str:
    # A virtual environment that is not activated has its scripts next to its interpreter, not on PATH.
    beside = Path(sys.executable).parent / f"protoc-gen-{name}"
    found = str(beside) if beside.exists() else shutil.which(beside.name)
    if found is None:
        raise GenerateError(f"{beside.name} is not installed: run `make venv`")
    return found


def differences(expected: Path, actual: Path) -> list[str]:
    """Names of the files that are missing, left over or different in `actual`, one line each."""
    wanted, present = _files(expected), _files(actual)
    lines = [f"missing: {name}" for name in sorted(wanted.keys() - present.keys())]
    lines += [f"left over: {name}" for name in sorted(present.keys() - wanted.keys())]
    both = wanted.keys() & present.keys()
    return lines + [f"differs: {name}" for name in sorted(both) if wanted[name] != present[name]]


def _files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*.py*") if path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def check(committed: Path = STUB_DIR) -> list[str]:
    """What `generate` would change in `committed`: empty when the stubs are those of proto/."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, "fresh")
        generate(fresh)
        return differences(fresh, committed)


def main(argv: list[str] | None = None) -> int:
    """Regenerate in place, or with --check print what is out of date and return 1."""
    parser = argparse.ArgumentParser(prog="python -m cluster.rpc.generate")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when stubs are out of date")
    options = parser.parse_args(argv)
    try:
        if options.check:
            stale = check()
            print("\n".join(stale) or "the stubs are up to date")
            return 1 if stale else 0
        with tempfile.TemporaryDirectory() as scratch:
            generate(Path(scratch, "easel"))
            shutil.rmtree(STUB_DIR, ignore_errors=True)
            shutil.copytree(Path(scratch, "easel"), STUB_DIR)
    except GenerateError as error:
        print(f"cluster.rpc.generate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
