# make demo    the whole pipeline on the built-in catalogue, on this machine
# make test    the test suite
# make clean   remove what was built here, never what runs wrote
#
# All make their own environment in .venv first; it is made again only when setup.cfg or pyproject.toml change.

PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(python))))
STAMP := .venv/.installed

# Several processes share the cores: threads that spin while they wait would steal time from each other.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test clean

demo: $(STAMP)
	.venv/bin/contrec pipeline --config configs/demo.yaml

test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	.venv/bin/python -m pytest -q

$(STAMP): setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python"; exit 1; }
	@echo "installing contrec_dist and its dependencies into .venv with $(PYTHON) (minutes, once)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
