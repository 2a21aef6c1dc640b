"""The tests that need a GPU: the clipper's, and those of training, DDP and FSDP2 over NCCL."""

import xml.etree.ElementTree as ET

from scripts.gpu_stages.context import Context

FILES = ("tests/zclip/test_cuda.py", "tests/training/test_gpu.py")
TIMER = "tests/training/test_module.py::test_step_timer_sums_the_time_of_each_phase"


def run(context: Context) -> None:
    """Save how many tests passed, and the names of those that did not."""
    report = context.out / "cuda-tests.xml"
    report.unlink(missing_ok=True)
    options = ("-q", "-p", "no:cacheprovider", "-o", "addopts=", f"--junitxml={report}")
    context.call("-m", "pytest", *options, *FILES, TIMER, log=context.name, check=False)
    if not report.exists():
        raise RuntimeError((context.out / f"{context.name}.log").read_text().strip().splitlines()[-1])
    cases = list(ET.parse(report).getroot().iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    context.save(passed=len(cases) - len(bad) - skipped, skipped=skipped, failed=bad)
    if bad:
        raise RuntimeError(f"{len(bad)} tests failed: {', '.join(map(str, bad[:3]))}")
