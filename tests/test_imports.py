"""What importing costs, what is public, and which way imports go."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "gradio", "langchain", "langchain_core", "faiss", "transformers", "numpy", "tantivy", "pydantic"}
PUBLIC = {
    "chains": [
        "BGEEmbeddings",
        "BgeReranker",
        "ChatGLM3",
        "FaissVectorStore",
        "KnowledgeBase",
        "LexicalEmbeddings",
        "RagConfig",
        "RetrievalQA",
        "build_retrieval_qa",
        "load_config",
    ],
}


def modules_after(code: str) -> set[str]:
    """Names of the modules that `code` loads in a fresh interpreter."""
    script = f"""
import sys
before = set(sys.modules)
{textwrap.dedent(code)}
import json
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("package", ["chains", "loaders", "finetune", "ui"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    assert packages(modules_after(f"import {package}")) & HEAVY == set()


def test_importing_chains_loads_only_the_standard_library() -> None:
    assert packages(modules_after("import chains")) - sys.stdlib_module_names == {"chains"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("from chains import load_config; load_config()", {"torch", "gradio", "faiss", "tantivy", "transformers"}),
        ("from chains import build_retrieval_qa", {"torch", "gradio", "faiss", "tantivy", "transformers"}),
        ("from chains import KnowledgeBase, FaissVectorStore", {"torch", "gradio", "faiss", "transformers"}),
        ("from chains import ChatGLM3; ChatGLM3(model='nowhere')", {"torch", "transformers", "tokenizers", "peft"}),
        ("import chains.ingestion", {"torch", "gradio", "faiss", "tantivy", "pdfplumber", "docx", "pptx"}),
        ("import loaders.documents", {"torch", "gradio", "faiss", "pdfplumber", "docx", "pptx", "rapidocr"}),
        ("import loaders.config", {"langchain", "langchain_core", "torch", "gradio", "numpy"}),
        ("import ui.handlers", {"torch", "gradio", "faiss"}),
    ],
)
def test_heavy_libraries_are_loaded_where_they_are_needed(code: str, absent: set[str]) -> None:
    assert packages(modules_after(code)) & absent == set()


@pytest.mark.parametrize("verb", ["", "ingest", "serve", "ask", "evaluate"])
def test_help_loads_only_the_standard_library_and_the_command(verb: str) -> None:
    loaded = modules_after(
        f"""
        import contextlib, io
        from ui.cli import main
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
            main({[verb, "--help"] if verb else ["--help"]!r})
        assert "ragproj" in out.getvalue()
        """
    )
    assert {name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names} == {"ui", "ui.cli"}


def test_bad_usage_loads_no_more_than_help() -> None:
    loaded = modules_after(
        """
        import contextlib, io
        from ui.cli import main
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            main(["nonsense"])
        """
    )
    assert packages(loaded) - sys.stdlib_module_names == {"ui"}


def test_importing_everything_writes_and_says_nothing(tmp_path: Path) -> None:
    """No log set-up, no environment changes, no files."""
    code = """
        import logging, os, sys
        before = dict(os.environ), list(logging.root.handlers), logging.root.level
        import chains.config, chains.ingestion, chains.retrieval_qa, chains.fulltext, loaders.documents, ui.cli
        assert before == (dict(os.environ), list(logging.root.handlers), logging.root.level)
    """
    result = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code)],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_these_and_exist(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == PUBLIC[package]
    for name in module.__all__:
        assert getattr(module, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    module = importlib.import_module("chains")
    with pytest.raises(AttributeError, match="module 'chains' has no attribute 'nonsense'"):
        _ = module.nonsense
    with pytest.raises(ImportError, match="nonsense"):
        exec("from chains import nonsense")


def test_star_import_brings_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from chains import *", namespace)
    assert set(PUBLIC["chains"]) <= namespace.keys()


def test_imports_go_down_the_floors_only() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("needs import-linter, which the extra [dev] brings")
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout


def test_no_package_of_ours_is_called_like_a_library() -> None:
    ours = {path.stem for package in ("chains", "finetune", "loaders", "ui") for path in (ROOT / package).rglob("*.py")}
    assert ours & {"datasets", "types", "faiss", "tantivy", "gradio", "logging", "email", "json"} == set()
