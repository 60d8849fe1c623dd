# Each command installs what it needs, which takes minutes the first time, and a network.
# Flags go in ARGS: make lab ARGS="--port 9000".
#
#   make lab                       open the course at chapter 1
#   make lab MODEL=folder          the same, with a real model for chapter 10
#   make mine                      try what is written in notebooks/, each answer by itself
#   make table                     measure memory and work of each way to run the model
#   make bench                     measure tokens per second, and the bandwidth of attention
#   make bench MODEL=folder        measure how fast a real model writes
#   make grade SUBMISSIONS=folder  grade a class
#   make gradescope CHAPTERS=3     make the zip of an assignment for Gradescope
#   make release THROUGH=3         make a zip of chapters 1 to 3, without the answers of 3
#   make slides                    make a page of slides for each chapter, in build/slides
#   make site                      make a site to read, in build/site
#   make test                      run the tests
#   make notebooks                 rebuild the notebooks from the chapter texts
#   make notebooks REPO=URL        the same, for Colab: with a cell that fetches the course
#   make help                      list these commands

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Whether a variable comes with this command, and not from the environment.
given = $(findstring command,$(origin $(1)))
# A real model, a folder or a GGUF file: make lab MODEL=folder tells chapter 10.
export MODEL

.PHONY: lab test table bench mine grade gradescope release notebooks site slides help
.DEFAULT_GOAL := lab

lab: .venv/course $(if $(MODEL),.venv/models)
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/01_generation.ipynb \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

test: .venv/dev
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

table: .venv/course
	@$(BIN)/python -m lib.measure.table $(ARGS)

bench: .venv/course $(if $(MODEL),.venv/models)
	@$(BIN)/python -m lib.measure.bench $(if $(MODEL),--model "$(MODEL)") $(ARGS)

grade: .venv/course
	$(if $(SUBMISSIONS),,$(error expected a folder or zip of notebooks: make grade SUBMISSIONS=folder))
	@$(BIN)/python -m lib.course.grading "$(SUBMISSIONS)" $(ARGS)

gradescope: .venv/course
	$(if $(CHAPTERS),,$(error expected chapters: make gradescope CHAPTERS=3))
	@$(BIN)/python -m lib.course.grading.gradescope $(CHAPTERS) $(ARGS)

site: .venv/site
	@$(BIN)/python -m lib.course.site $(ARGS)

slides: .venv/site
	@$(BIN)/python -m lib.course.slides $(ARGS)

notebooks: .venv/dev
	@$(BIN)/python -m lib.course.build $(if $(call given,REPO),--repo='$(REPO)') $(if $(call given,TAG),--tag='$(TAG)') $(ARGS)

mine: .venv/course
	@$(BIN)/python -m lib.course.grading --mine notebooks $(ARGS)

release: .venv/dev
	@$(BIN)/python -m lib.course.release "$(THROUGH)" $(ARGS)

help:
	@sed -n 's|^#   ||p' Makefile

.venv/course: requirements.txt pyproject.toml
	@$(call install,-r requirements.txt)
	@touch $@

# The same environment, and what reads real models.
.venv/models: .venv/course
	@$(call install,-e '.[models]')
	@touch $@

# The same environment, and what makes the site and the slides.
.venv/site: .venv/course
	@$(call install,-e '.[site]')
	@touch $@

# The same environment, and what tests and builds need.
.venv/dev: .venv/course
	@$(call install,-e '.[dev]')
	@touch $@

define install
command -v $(PYTHON) >/dev/null 2>&1 || \
  { echo "Python: expected $(PYTHON) on the PATH, found none. Install Python 3.10 or later, or name it: make PYTHON=..."; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
  { echo "Python: expected 3.10 or later, got $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; exit 1; }; \
[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv >/dev/null 2>&1 || \
  { echo "Python: $(PYTHON) -m venv failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; }; \
echo "Installing into .venv, a few minutes the first time ..."; \
$(BIN)/pip install --disable-pip-version-check $(1) >.venv/install.log 2>&1 || \
  { echo "Installing failed (is there a network?): $$(grep -m1 '^ERROR' .venv/install.log); all of it: .venv/install.log"; exit 1; }
endef
