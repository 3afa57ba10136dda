"""The matrix: each architecture in each script, trained and used; every cell works or is refused with the truth.

The table of docs/architectures.md is checked against what happens here.
"""

import json
import re

import pyarrow.parquet as parquet
import pytest
import torch
from architectures import ARCHITECTURES, save_model
from conftest import FULL, ROOT, save_tokenizer

pytestmark = pytest.mark.usefixtures("undrawn")
COLUMNS = ("LoRA packed", "LoRA unpacked", "NF4", "GaLore", "chat", "merge", "GGUF")
TEMPLATES = ("none", "adds tokens", "own")
FAMILY = {"llama-3.2": "llama3", "mistral-nemo": "mistral", "mistral-window": "mistral", "mixtral": "mistral"}
SPECIAL = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}


@pytest.fixture(scope="module")
def tokenizer_for(tmp_path_factory, base_tokenizer_folder):
    """tokenizer_for(name, template): the folder of a tokenizer without a template, or with its family's."""
    from transformers import AutoTokenizer

    from common.data import templates

    made = {}

    def make(name, template):
        family = FAMILY.get(name, "chatml")
        if template != "own":
            return base_tokenizer_folder
        if family not in made:
            special = ["<|endoftext|>", *SPECIAL.get(family, [])]
            made[family] = save_tokenizer(tmp_path_factory.mktemp(family), special, special[-1])
            tokenizer = AutoTokenizer.from_pretrained(made[family])
            templates.set_template(tokenizer, family)
            tokenizer.save_pretrained(made[family])
        return made[family]

    return make


def plain_model(base, final, quantization=None):
    """What a run wrote, by transformers and peft alone: eager attention; merged, since peft 0.21's adapters on a head
    with a bias lose it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how = {"quantization_config": BitsAndBytesConfig(**four_bits)} if quantization else {}
    folder = final if (final / "config.json").is_file() else base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **how)
    if folder == final:
        return model.eval()
    if quantization:
        model = model.dequantize()
    return PeftModel.from_pretrained(model, final).merge_and_unload().eval()


@torch.no_grad()
def plain_loss(model, run) -> float:
    """Mean loss of the held-out answers, chat by chat."""
    losses = []
    for row in parquet.read_table(run / "data" / "eval.parquet").to_pylist():
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["assistant_masks"])[1:].bool()
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[mask])
    return torch.cat(losses).mean().item()


def plain_answer(model, run, question: str, length: int) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|endoftext|>"])]
    new = model.generate(**inputs, max_new_tokens=length, do_sample=False, eos_token_id=ends, pad_token_id=0)
    return tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# MATRIX=full: every cell for every template. Else a row with new tokens, and one of the other templates in turn.
@pytest.mark.parametrize(
    "name, template",
    [
        (name, template)
        for number, name in enumerate(ARCHITECTURES)
        for template in (TEMPLATES if FULL else ("adds tokens", ("none", "own")[number % 2]))
    ],
)
def test_every_cell_works_or_is_refused(name, template, tokenizer_for, run_here, tmp_path):
    base, cells = save_model(name, tmp_path / "base", tokenizer_for(name, template)), {}

    def run(script, column, *more):
        done = run_here(script, f"OUT_DIR={tmp_path}", f"RUN_NAME={column}", "DTYPE=float32", *more)
        return *done, tmp_path / column

    def train(column, *more, script="qlora_train.py"):
        chosen = ["CHAT_TEMPLATE=chatml"] if template == "adds tokens" else []
        code, out, err, folder = run(
            script, column.replace(" ", "-"), f"MODEL={base}", "DATA=data/brief.jsonl", "MAX_SAMPLES=24", "MAX_STEPS=2",
            "MAX_LENGTH=256", "EVAL_SIZE=3", "LEARNING_RATE=1e-2", "SAVE_STEPS=None", *chosen, *more,
        )  # fmt: skip
        assert code == 0, err
        assert "could not be predicted" not in err and "check: losses differ by" in out
        model = plain_model(base, folder / "final", quantization="nf4" if column == "NF4" else None)
        loss = json.loads((folder / "summary.json").read_text())["eval_loss"]
        assert loss == pytest.approx(plain_loss(model, folder), rel=1e-4), column
        cells[column] = "unpacked" if "PACKING=False: " in out else "yes"
        return folder, model

    whole_row = FULL or template == "adds tokens"
    if whole_row:
        train("LoRA unpacked", "PACKING=False", "LORA_R=4")
        train("NF4", "QUANTIZATION=nf4", "LORA_R=4")
        train("GaLore", "GALORE_RANK=4", script="galore_train.py")
    lora, model = train("LoRA packed", "LORA_R=4")
    question = "Why is the sky blue, and since when have people known?"  # longer than the windows
    code, out, err = run_here("chat_pipe.py", f"MODEL={lora}", f"PROMPT={question}", "TEMPERATURE=0",
                              "MAX_NEW_TOKENS=8", "DTYPE=float32")  # fmt: skip
    assert code == 0, err
    # A stream shows a character once all its bytes are there.
    ours, plain = (re.sub("\ufffd|\\s", "", text) for text in (out, plain_answer(model, lora, question, 8)))
    assert ours == plain
    if not whole_row:
        return
    cells["chat"] = cells["merge"] = cells["GGUF"] = "yes"
    code, _, err, merged = run("merge_and_export.py", "gguf", f"MODEL={lora}", "GGUF=f16", "PROOF_TOKENS=60")
    if code:
        assert code == 2 and (refusal := re.search(r"error: GGUF: (cannot write .*)", err)), err
        cells["GGUF"] = re.sub(r", only.*", "", refusal[1]).removesuffix(" Set GGUF=None.")
        code, _, err, merged = run("merge_and_export.py", "merged", f"MODEL={lora}", "PROOF_TOKENS=60")
        assert code == 0, err
    whole = plain_model(base, merged / "final")
    assert plain_loss(whole, lora) == pytest.approx(plain_loss(model, lora), rel=1e-5)
    row = f"| {name} | {' | '.join(cells[column] for column in COLUMNS)} |"
    assert row in (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").splitlines(), row
