"""The contract: the stubs are those of proto/, and every part of it says what it is for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from cluster.rpc import generate

# Field numbers of descriptor.proto by which a comment's place in a file is told.
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS = 2
VALUES, METHODS = 2, 2

Item = tuple[str, tuple[int, ...]]


def test_the_committed_stubs_are_those_of_the_contract() -> None:
    assert generate.check() == []


def test_a_stub_that_is_changed_missing_or_left_over_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "easel"
    shutil.copytree(generate.STUB_DIR, copy, ignore=shutil.ignore_patterns("__pycache__"))
    changed = copy / "v1" / "jobs_pb2.py"
    changed.write_text(changed.read_text() + "# more\n")
    (copy / "v1" / "cluster_pb2.pyi").unlink()
    (copy / "v1" / "old_pb2.py").write_text("")
    assert generate.differences(generate.STUB_DIR, copy) == [
        "missing: v1/cluster_pb2.pyi",
        "left over: v1/old_pb2.py",
        "differs: v1/jobs_pb2.py",
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    from grpc_tools import protoc  # type: ignore[import-untyped]  # ships no type information

    out = tmp_path_factory.mktemp("descriptors") / "set.bin"
    well_known = Path(protoc.__file__).parent / "_proto"
    sources = [str(path.relative_to(generate.PROTO_DIR)) for path in generate.PROTO_DIR.rglob("*.proto")]
    arguments = [f"-I{generate.PROTO_DIR}", f"-I{well_known}", "--include_source_info"]
    assert protoc.main(["protoc", *arguments, f"--descriptor_set_out={out}", *sources]) == 0
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def test_packages_follow_the_folders(files: list[FileDescriptorProto]) -> None:
    assert {file.package for file in files} == {"easel.v1", "easel.internal.v1"}
    for file in files:
        assert file.name.rsplit("/", 1)[0].replace("/", ".") == file.package


def test_everything_in_the_contract_has_a_comment(files: list[FileDescriptorProto]) -> None:
    bare = []
    for file in files:
        commented = {tuple(at.path) for at in file.source_code_info.location if at.leading_comments.strip()}
        bare += [f"{file.name}: {name}" for name, path in items(file) if path not in commented]
    assert bare == []


def items(file: FileDescriptorProto) -> Iterator[Item]:
    """Everything in a file that needs a comment, with its place."""
    for index, message in enumerate(file.message_type):
        at = (MESSAGES, index)
        yield message.name, at
        assert not message.nested_type or all(nested.options.map_entry for nested in message.nested_type)
        for number, field in enumerate(message.field):
            yield f"{message.name}.{field.name}", (*at, FIELDS, number)
    for index, enum in enumerate(file.enum_type):
        yield enum.name, (ENUMS, index)
        for number, value in enumerate(enum.value):
            yield value.name, (ENUMS, index, VALUES, number)
    for index, service in enumerate(file.service):
        yield service.name, (SERVICES, index)
        for number, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (SERVICES, index, METHODS, number)


def test_enum_values_carry_the_name_of_their_enum_and_start_unspecified(
    files: list[FileDescriptorProto],
) -> None:
    enums = [enum for file in files for enum in file.enum_type]
    assert enums
    for enum in enums:
        prefix = "".join(f"_{c}" if c.isupper() else c.upper() for c in enum.name).lstrip("_") + "_"
        assert all(value.name.startswith(prefix) for value in enum.value)
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}UNSPECIFIED", 0)
