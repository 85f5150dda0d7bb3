"""`nox` checks style, types, the wheel and the tests; `nox -l` lists what else there is."""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"

PYPROJECT = nox.project.load_toml("pyproject.toml")
DOCUMENTED = (
    "moba_flex",
    "moba_flex.compile",
    "!moba_flex.compile.exporter",  # the function of that name is in moba_flex.compile
    "moba_flex.diagnostics",
    "moba_flex.distributed",
    "moba_flex.integrations.batching",
    "moba_flex.integrations.transformers",
    "moba_flex.masks.patterns",
)
INSTALLED = """
import importlib.metadata, importlib.resources
import moba_flex.compile, moba_flex.masks, moba_flex.integrations
assert importlib.resources.files("moba_flex").joinpath("py.typed").is_file()
owners = importlib.metadata.packages_distributions()
assert owners["moba_flex"] == ["moba-flex"]
assert not {"compile", "integrations", "masks", "perf", "tests"} & set(owners), owners
"""


def install(session: nox.Session, *requirements: str, groups: tuple[str, ...] = ()) -> None:
    """Install requirements and dependency groups at the versions in constraints.txt."""
    needs = nox.project.dependency_groups(PYPROJECT, *groups)
    session.install("-c", "constraints.txt", *requirements, *needs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, groups=("lint",))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(default=False)
def types(session: nox.Session) -> None:
    """Check types alone; "tests" checks them too."""
    install(session, "-e", ".[hf,plot]", groups=("types", "test", "perf"))
    session.run("mypy")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build sdist and wheel, and use the wheel, without extras, away from the checkout."""
    install(session, "build", "torch")
    dist = Path(session.create_tmp(), "dist").absolute()
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    session.install("--no-deps", "--force-reinstall", *map(str, dist.glob("*.whl")))
    session.chdir(session.create_tmp())
    session.run("python", "-c", INSTALLED)
    session.run("moba-flex", "--version")


@nox.session
def tests(session: nox.Session) -> None:
    """Check types, run the tests and each benchmark once; arguments after -- go to pytest."""
    # One environment for both: to install another takes as long as to check types.
    install(session, "-e", ".[hf,plot]", groups=("types", "test", "perf"))
    if not session.posargs:
        session.run("mypy")
    everything = ["tests", "perf", "--benchmark-disable", "-n", "auto", "--dist", "worksteal"]
    # A process for each core, and a thread for each process.
    session.run("pytest", *(session.posargs or everything), env={"OMP_NUM_THREADS": "1"})


@nox.session(default=False)
def cuda(session: nox.Session) -> None:
    """Run the tests that need a CUDA device; arguments after -- go to pytest."""
    install(session, "-e", ".[hf,plot]", groups=("test", "perf"))
    session.run("pytest", "-m", "cuda", *session.posargs)


@nox.session(default=False)
def perf(session: nox.Session) -> None:
    """Time every implementation on the machine at hand; arguments after -- go to pytest."""
    install(session, "-e", ".[hf,plot]", groups=("perf",))
    session.run("pytest", "perf", *session.posargs)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Write API pages into build/docs; arguments after -- go to pdoc, such as --port 8080."""
    install(session, "-e", ".[hf,plot]", groups=("docs",))
    where = session.posargs or ["--output-directory", "build/docs"]
    session.run("pdoc", "--docformat", "google", *where, *DOCUMENTED)
