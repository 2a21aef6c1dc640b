"""Memory limits of containers: made-up cgroup trees of version 2 and version 1."""

import os

import pytest

from training.runtime.hardware import PEAK_FLOPS, available_memory, container_memory, peak_flops

GIB = 2**30
V1_UNLIMITED = 9223372036854771712
V1 = "12:cpuset:{path}\n4:memory:{path}\n1:name=systemd:{path}\n"


def limit(tmp_path, cgroup, files):
    """Return the limit of a process whose /proc/self/cgroup and /sys/fs/cgroup have this content."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cgroup").write_text(cgroup)
    for name, content in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return container_memory(tmp_path / "proc", tmp_path / "cgroup")


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param("0::/\n", {"memory.max": 4 * GIB}, 4 * GIB, id="v2-root-of-namespace"),
        pytest.param("0::/\n", {"memory.max": "max"}, None, id="v2-unlimited"),
        pytest.param("0::/job/step\n", {"job/step/memory.max": 3 * GIB}, 3 * GIB, id="v2-own-group"),
        pytest.param("0::/job/step\n", {"job/memory.max": 2 * GIB, "job/step/memory.max": "max"}, 2 * GIB,
                     id="v2-parent-is-stricter"),
        pytest.param("0::/job/step\n", {"job/memory.max": 5 * GIB, "job/step/memory.max": GIB}, GIB,
                     id="v2-child-is-stricter"),
        pytest.param("0::/docker/abc\n", {"memory.max": 6 * GIB}, 6 * GIB, id="v2-path-is-not-mounted"),
        pytest.param("0::/../other\n", {"memory.max": 6 * GIB, "other/memory.max": GIB}, 6 * GIB,
                     id="v2-outside-of-namespace"),
        pytest.param("0::/a\n", {"b/memory.max": GIB}, None, id="v2-sibling-does-not-count"),
        pytest.param(V1.format(path="/"), {"memory/memory.limit_in_bytes": 4 * GIB}, 4 * GIB, id="v1-root"),
        pytest.param(V1.format(path="/"), {"memory/memory.limit_in_bytes": V1_UNLIMITED}, None, id="v1-unlimited"),
        pytest.param(V1.format(path="/docker/abc"), {"memory/memory.limit_in_bytes": 7 * GIB}, 7 * GIB,
                     id="v1-path-is-not-mounted"),
        pytest.param(V1.format(path="/slurm/job"),
                     {"memory/memory.limit_in_bytes": V1_UNLIMITED, "memory/slurm/memory.limit_in_bytes": 2 * GIB,
                      "memory/slurm/job/memory.limit_in_bytes": 3 * GIB}, 2 * GIB, id="v1-nested"),
        pytest.param(V1.format(path="/job") + "0::/job\n",
                     {"memory/job/memory.limit_in_bytes": 2 * GIB, "job/cgroup.procs": 1}, 2 * GIB, id="hybrid"),
        pytest.param("no cgroup line\n0::/\n", {"memory.max": GIB}, GIB, id="malformed-line"),
        pytest.param("0::/\n", {"memory.max": "many"}, None, id="malformed-limit"),
        pytest.param("", {"memory.max": GIB}, None, id="no-groups"),
    ],
)  # fmt: skip
def test_memory_limit_of_a_container(cgroup, files, expected, tmp_path):
    assert limit(tmp_path, cgroup, files) == expected


def test_system_without_cgroups_has_no_limit(tmp_path):
    assert container_memory(tmp_path / "gone", tmp_path) is None


def test_processes_share_the_smaller_of_machine_and_container(monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for container, expected in ((None, machine), (machine // 2, machine // 2), (2 * machine, machine)):
        monkeypatch.setattr("training.runtime.hardware.container_memory", lambda container=container: container)
        assert available_memory("cpu", 2) == expected // 2


def test_peak_flops_needs_the_whole_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == PEAK_FLOPS["H100"]
    assert peak_flops("NVIDIA H100 PCIe") == PEAK_FLOPS["H100 PCIe"]
    assert peak_flops("NVIDIA A100-SXM4-80GB") == PEAK_FLOPS["A100"]
    assert peak_flops("NVIDIA L4") == PEAK_FLOPS["L4"]
    assert peak_flops("NVIDIA L40") is None, "an L40 is not an L4"
