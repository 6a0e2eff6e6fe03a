"""What control groups leave to a process, from trees of files as Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lillama_core.system.control_groups import OWN, ROOT, memory_left

GB = 10**9


def group(folder: Path, limit: object, used: int, idle: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - idle}\n{names[2]} {idle}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def own(folder: Path, text: str) -> Path:
    path = folder / "own"
    path.write_text(text)
    return path


def test_the_tightest_group_around_the_process_counts(tmp_path: Path) -> None:
    job = tmp_path / "slurm" / "job_7" / "step_0"
    group(job, "max", 3 * GB, 0, V2)
    group(job.parent, 8 * GB, 5 * GB, 2 * GB, V2)
    group(job.parents[1], 64 * GB, 6 * GB, 0, V2)
    group(tmp_path / "slurm" / "job_8", GB, GB, 0, V2)  # another job's
    assert memory_left(tmp_path, own(tmp_path, "0::/slurm/job_7/step_0\n")) == 5 * GB


def test_the_first_version_has_a_tree_for_memory(tmp_path: Path) -> None:
    group(tmp_path / "memory" / "docker" / "a1", 4 * GB, 3 * GB, GB, V1)
    group(tmp_path / "memory", 2**63 - 4096, 9 * GB, 0, V1)
    lines = "4:cpu,cpuacct:/elsewhere\n3:memory:/docker/a1\n0::/\n"
    assert memory_left(tmp_path, own(tmp_path, lines)) == 2 * GB


@pytest.mark.parametrize("path", ["/../../of/the/host", "/nowhere", "/"])
def test_in_a_container_the_root_is_its_own_group(tmp_path: Path, path: str) -> None:
    group(tmp_path / "root", 2 * GB, GB, 0, V2)
    assert memory_left(tmp_path / "root", own(tmp_path, f"0::{path}\n")) == GB


def test_used_up_is_nothing_left(tmp_path: Path) -> None:
    group(tmp_path / "root", GB, GB + 4096, 0, V2)
    assert memory_left(tmp_path / "root", own(tmp_path, "0::/\n")) == 0


def test_where_there_are_no_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_left(tmp_path / "none", tmp_path / "nothing") is None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_left(tmp_path, own(tmp_path, "not three parts\n")) is None


@pytest.mark.skipif(not OWN.exists() or not ROOT.exists(), reason="needs Linux's control groups")
def test_this_process_may_still_take_something() -> None:
    left = memory_left()
    assert left is None or left > 0
