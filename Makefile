# Two commands on a fresh machine: `make demo` and `make test`. `make` lists them all.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# SQL is checked against .sqlx/; `make prepare` brings that up to date.
export SQLX_OFFLINE ?= true
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Packages beside the workspace share what is built.
IN_TARGET := CARGO_TARGET_DIR=$(abspath $(TARGET))

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup-demo ## Start the server on its embedded PostgreSQL with 100 simulated devices; Ctrl-C stops it
	cargo build --release --locked
	@exec $(TARGET)/release/muster demo

.PHONY: test
test: setup ## Run all tests, on a PostgreSQL of their own
	cargo nextest run --locked --workspace --no-run
	$(TARGET)/debug/with-postgres -- cargo nextest run --locked --workspace

.PHONY: check
check: setup ## Format, lints, SQL, documentation, fuzz targets: what must hold before a commit
	cargo fmt --all --check
	scripts/sql.sh check
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet
	$(IN_TARGET) cargo build --locked --quiet --manifest-path broker/fuzz/Cargo.toml
	@if command -v cargo-deny >/dev/null; then cargo deny --locked check bans licenses sources; fi

.PHONY: build
build: setup-demo ## The release binary: target/release/muster
	cargo build --release --locked

.PHONY: prepare
prepare: setup ## Check all SQL against the migrations and renew .sqlx/, and the locks of the packages beside
	scripts/sql.sh prepare
	cargo update --quiet --workspace --manifest-path broker/fuzz/Cargo.toml
	cargo update --quiet --workspace --manifest-path bench/Cargo.toml

.PHONY: openapi
openapi: ## Renew the API's description, api/openapi.json
	cargo run --locked --quiet -p api --example openapi

.PHONY: bench
bench: setup ## Measure beside mosquitto, rumqttd and psql; writes docs/benchmarks.md (a quarter of an hour)
	cargo build --release --locked
	$(IN_TARGET) cargo run --release --locked --manifest-path bench/Cargo.toml --bin bench -- all

.PHONY: soak
ROUNDS ?= 20
soak: setup ## The crash drill for long (ROUNDS=20): kill server and PostgreSQL again and again under load
	cargo nextest run --locked --workspace --no-run
	MUSTER_SOAK_ROUNDS=$(ROUNDS) $(TARGET)/debug/with-postgres -- cargo nextest run --locked -p muster --profile soak --no-capture crash
	cargo nextest run --locked -p fleet-core --profile soak --no-capture --run-ignored only

# What cargo-fuzz would pass; without a sanitizer, which safe Rust does not need, the stable compiler will do.
HOST = $(shell rustc -vV | sed -n 's/host: //p')
FUZZ_FLAGS := --cfg fuzzing -Cdebug-assertions -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares

.PHONY: fuzz
SECONDS ?= 600
fuzz: setup ## Attack the decoders and the query parser, then a server's connections and sessions (SECONDS=600 each, SEED=…)
	RUSTFLAGS="$(FUZZ_FLAGS)" $(IN_TARGET) cargo build --locked --target $(HOST) --manifest-path broker/fuzz/Cargo.toml
	for target in decoder log_payload query; do \
	  mkdir -p $(TARGET)/corpus/$$target && $(TARGET)/$(HOST)/debug/$$target -max_total_time=$(SECONDS) -print_final_stats=1 \
	    -artifact_prefix=$(TARGET)/$$target- $(TARGET)/corpus/$$target || exit 1; \
	done
	cargo nextest run --locked --workspace --no-run
	MUSTER_FUZZ_SECONDS=$(SECONDS) MUSTER_FUZZ_SEED=$(SEED) $(TARGET)/debug/with-postgres -- \
	  cargo nextest run --locked -p muster --profile soak --no-capture --run-ignored only fuzz::

.PHONY: setup
setup: ## Install what tests and checks need, where that is allowed
	@scripts/setup.sh test

.PHONY: setup-demo
setup-demo: ## Install what the product needs
	@scripts/setup.sh demo
