# make chat  建环境、导入示例知识库、打开网页 / environment, sample knowledge base, page on http://127.0.0.1:7860
# make test  建测试环境并运行所有检查 / environment with what the tests need, then every gate

.DEFAULT_GOAL := help
.PHONY: help chat test lint clean

VENV := .venv
BIN := $(VENV)/bin
KB ?= kb
PORT ?= 7860
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

help:
	@head -2 Makefile | cut -c3-

chat: $(VENV)/.base
	@$(BIN)/ragproj ingest docs/*.md --kb $(KB)
	@$(BIN)/ragproj serve --kb $(KB) --port $(PORT)

# Two files at a time, each on one thread: torch's threads in both at once would wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV)

# The stamps are written last, so that an install that broke off is done again.
$(VENV)/.base: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "安装依赖，约一分钟 / installing, about a minute …"
	$(INSTALL) '.[cpu]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "安装测试所需的依赖 / installing what the tests need …"
	$(INSTALL) '.[cpu,ocr,openvino,train,dev]'
	touch $@ $(VENV)/.base

$(VENV)/bin/python:
	@for candidate in "$${PYTHON:-python3}" python3 python3.13 python3.12 python3.11 python; do \
	  if "$$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    exec "$$candidate" -m venv $(VENV); \
	  fi; \
	done; \
	echo "需要 Python 3.11–3.13（含 venv），没有找到；安装后重试，或 make chat PYTHON=python3.12" >&2; \
	echo "needs Python 3.11-3.13 with venv, none found; install one, or name it: make chat PYTHON=python3.12" >&2; \
	exit 1
