"""Preference training: each loss equals TRL's on the same pairs and weights; the reference, resumes, warnings."""

import inspect
import json
import re
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT, execute, save_tiny, write_jsonl
from datasets import Dataset
from test_varlen import one_by_one
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data import templates
from common.data.compared import IGNORE_INDEX, sequences_of, with_mismatched
from common.model import adapters, varlen
from common.run import report
from common.train import kept_reference, preference_trainer, sft
from common.train.preference import PAIR_METRICS, Preference

STEPS, PAIRS = 6, 8  # of a run; of a step
TRL = dict(
    per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=1e-2, lr_scheduler_type="constant",
    warmup_steps=0, logging_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no", beta=0.1,
    weight_decay=0.0, optim="adamw_torch_fused", gradient_checkpointing=False, disable_tqdm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tokenizer_folder, tmp_path_factory):
    """A tiny model with our ChatML as its own template, so that no token is new."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("base"), tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = (templates.FOLDER / "chatml.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = templates.MARKS.sub("", template)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of 60 pairs and of 60 labelled answers."""
    lines = (ROOT / "data" / "brief.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"][-2:] for line in lines[:60]]
    answers = [answer["content"] for _, answer in turns]
    folder, pairs, labelled = tmp_path_factory.mktemp("pairs"), [], []
    for number, (question, answer) in enumerate(turns):
        prompt, other = f"{question['content']} ({number})", answers[number - 7] + " So it is."
        pairs.append({"prompt": prompt, "chosen": answer["content"], "rejected": other})
        is_good = number % 3 > 0
        labelled.append({"prompt": prompt, "completion": answer["content"] if is_good else other, "label": is_good})
    return write_jsonl(folder / "pairs.jsonl", pairs), write_jsonl(folder / "labelled.jsonl", labelled)


@pytest.fixture
def train(base, files, tmp_path, monkeypatch):
    """train(loss, "NAME=value", ...): a run in float32; its metrics, the rows in their order, its first weights."""
    rows, first = [], {}
    collate, preflight = preference_trainer.PairCollator.__call__, preference_trainer.PreferenceTrainer.restore_progress

    def record(self, examples):
        rows.extend(examples)
        return collate(self, examples)

    def begin(self):
        preflight(self)
        rows.clear()  # of the check
        first.update((name, p.detach().clone()) for name, p in self.model.named_parameters() if p.requires_grad)

    monkeypatch.setattr(preference_trainer.PairCollator, "__call__", record)
    monkeypatch.setattr(preference_trainer.PreferenceTrainer, "restore_progress", begin)

    def run(loss, *more, name="run"):
        arguments = [
            f"MODEL={base}", f"DATA={files[loss == 'kto']}", f"LOSS={loss}", "DTYPE=float32", "LORA_R=4", "EVAL_SIZE=0",
            f"BATCH_SIZE={PAIRS}", f"MAX_STEPS={STEPS}", "MAX_LENGTH=512", "LEARNING_RATE=1e-2", f"OUT_DIR={tmp_path}",
            "LR_SCHEDULER=constant", "WARMUP_RATIO=0", "SAVE_STEPS=None", f"RUN_NAME={name}", "SFT_WEIGHT=0", *more,
        ]  # fmt: skip
        assert execute("preference_train.py", arguments) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], rows[: STEPS * PAIRS], first

    return run


def parts(row: dict) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer with its end token) of each sequence."""
    found = []
    for part in sequences_of(row):
        learned = [i for i, label in enumerate(part["labels"]) if label != IGNORE_INDEX]
        ids = part["input_ids"]
        found.append((ids[: learned[0]], ids[learned[0] : learned[-1] + 1]))
    return found


def in_order(trainer_class, **methods):
    """TRL's trainer, which takes our tokens, in our order."""
    methods |= {"_get_train_sampler": lambda self, *args: SequentialSampler(self.train_dataset)}
    return type("InOrder", (trainer_class,), methods)


def tokens_given(self, dataset, *args):
    return dataset


def odds_rows(rows: list[dict]) -> list[dict]:
    """Rows for TRL's experimental trainers."""
    found = []
    for row in rows:
        made = {"prompt": "a", "chosen": "b", "rejected": "c"}
        for side, (prompt, answer) in zip(("chosen", "rejected"), parts(row), strict=True):
            ids = prompt + answer
            labels = [IGNORE_INDEX] * len(prompt) + answer
            made |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids), f"{side}_labels": labels}
        found.append(made | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)})
    return found


def peer(loss: str, rows: list[dict], sft_weight: float):
    """(trainer class, config, rows) of TRL for a loss."""
    if loss in ("dpo", "ipo"):
        from trl import DPOConfig, DPOTrainer

        names = [{"dpo": "sigmoid"}.get(loss, loss), *(["sft"] if sft_weight else [])]
        config = DPOConfig(**TRL, output_dir="unused", loss_type=names, loss_weights=[1.0, sft_weight][: len(names)])
        tokens = [parts(row) for row in rows]
        tokens = [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for (p, c), (_, r) in tokens]
        return in_order(DPOTrainer, _prepare_dataset=tokens_given), config, tokens
    if loss == "kto":
        from trl import KTOConfig, KTOTrainer

        config = KTOConfig(**TRL, output_dir="unused", train_sampling_strategy="sequential")
        tokens = []
        for row in rows:
            other = row["mismatched"] | {"seq_lengths": [len(row["mismatched"]["labels"])]}
            ((prompt, answer),), ((_, kl_answer),) = parts(row), parts(other)
            ids = dict(prompt_ids=prompt, completion_ids=answer, KL_completion_ids=kl_answer)
            tokens.append(ids | {"label": row["is_good"]})
        return in_order(KTOTrainer, _prepare_dataset=tokens_given), config, tokens
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    options = dict(output_dir="unused", max_length=512)
    if loss == "simpo":
        config = CPOConfig(**TRL, **options, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5)
        return in_order(CPOTrainer, tokenize_row=lambda self, row, model=None: row), config, odds_rows(rows)
    # TRL takes the loss of the prompt in, too; the paper does not.
    source = textwrap.dedent(inspect.getsource(ORPOTrainer.concatenated_forward))
    inputs, labels = (f'labels = concatenated_batch["concatenated_{name}"].clone()' for name in ("input_ids", "labels"))
    of_all = "labels = torch.where(attention_mask == 1, labels, -100)"
    assert inputs in source and of_all in source
    source = source.replace(inputs, labels).replace(of_all, "pass")
    names = vars(sys.modules[ORPOTrainer.__module__]) | {}
    exec(source, names)
    methods = {"concatenated_forward": names["concatenated_forward"], "tokenize_row": lambda self, row, model=None: row}
    return in_order(ORPOTrainer, **methods), ORPOConfig(**TRL, **options), odds_rows(rows)


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize(
    "loss, more, sft_weight",
    [
        ("dpo", ["REFERENCE=live"], 0.0),
        ("dpo", ["SFT_WEIGHT=0.5", "PER_DEVICE_TRAIN_BATCH_SIZE=2"], 0.5),
        ("ipo", [], 0.0),
        ("simpo", [], 0.0),
        ("orpo", [], 0.0),
        ("kto", [], 0.0),
        ("kto", ["REFERENCE=live", "PACKING=False", "PER_DEVICE_TRAIN_BATCH_SIZE=4"], 0.0),
    ],
)
def test_losses_are_those_of_trl(loss, more, sft_weight, train, base):
    metrics, rows, first = train(loss, *more)
    kind, config, tokens = peer(loss, rows, sft_weight)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = dict(ADAPTER="lora", LORA_R=4, LORA_ALPHA=32, LORA_DROPOUT=0.0, MODEL="", LORA_LAYERS=None)
    model = adapters.add_adapter(model, settings | {"LORA_TARGET_MODULES": "auto"})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == first.keys()
    for name, parameter in trained.items():
        parameter.data = first[name].clone()
    tokenizer = AutoTokenizer.from_pretrained(base)
    theirs = kind(model=model, args=config, train_dataset=Dataset.from_list(tokens), processing_class=tokenizer)
    theirs.train()
    expected = [entry for entry in theirs.state.log_history if "loss" in entry]
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in metrics] == pytest.approx([float(e[name]) for e in expected], rel=1e-3)
    if loss in ("dpo", "ipo"):
        chosen = [float(entry["rewards/chosen"]) for entry in expected]
        assert [entry["chosen_reward"] for entry in metrics] == pytest.approx(chosen, rel=1e-3, abs=1e-5)


def test_the_first_loss_is_that_of_no_change(train):
    metrics, _, _ = train("dpo")
    assert metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-7) and metrics[0]["margin"] == 0
    assert metrics[0]["accuracy"] == 0.5  # ties count half


def test_a_loss_of_pairs_has_no_perplexity_and_the_picture_shows_rewards(train, tmp_path, capsys, monkeypatch):
    drawn = []
    honest = report.plot_pairs
    monkeypatch.setattr(report, "plot_pairs", lambda axes, metrics: drawn.append(axes) or honest(axes, metrics))
    metrics, _, _ = train("dpo", "EVAL_SIZE=6", "MAX_STEPS=2")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss"] == metrics[-1]["eval_loss"] and summary["eval_perplexity"] is None
    assert metrics[-1]["eval_perplexity"] is None and set(metrics[-1]) > {f"eval_{name}" for name in PAIR_METRICS}
    out = capsys.readouterr().out
    assert "perplexity" not in out and re.search(r"eval loss [\d.]+  accuracy \d+%  margin ", out)
    lines = {line.get_label(): len(line.get_xdata()) for line in drawn[0].lines}
    assert lines["chosen reward"] == lines["rejected reward"] == 2


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize("loss, reference", [("dpo", "kept"), ("kto", "live")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(loss, reference, train, tmp_path, monkeypatch):
    settings = [f"REFERENCE={reference}", "SAVE_STEPS=1", "EVAL_SIZE=6", "EVAL_STEPS=2", "LORA_DROPOUT=0.1"]
    expected, _, _ = train(loss, *settings, name="whole")
    honest = preference_trainer.PreferenceTrainer.training_step

    def fail_at_four(self, *args):
        if self.state.global_step == 4:
            raise ZeroDivisionError
        return honest(self, *args)

    monkeypatch.setattr(preference_trainer.PreferenceTrainer, "training_step", fail_at_four)
    with pytest.raises(ZeroDivisionError):
        train(loss, *settings, name="run")
    monkeypatch.setattr(preference_trainer.PreferenceTrainer, "training_step", honest)
    metrics, _, _ = train(loss, *settings, name="run")
    for one, other in zip(expected, metrics, strict=True):
        for name in ("loss", "eval_loss", "accuracy", "margin", "eval_accuracy", "eval_margin", "learning_rate"):
            assert one.get(name) == other.get(name)
    adapters_written = [
        (tmp_path / run / "final" / "adapter_model.safetensors").read_bytes() for run in ("whole", "run")
    ]
    assert adapters_written[0] == adapters_written[1]


@pytest.mark.usefixtures("undrawn")
def test_prompts_are_shared_by_the_kernel_of_gpus_unless_it_is_wrong(train, monkeypatch, capsys):
    """By its stand-in, which in the second run is wrong about more keys than queries; the trace is by the kernel."""
    found, honest = [], varlen.varlen.varlen_attn

    def kernel(query, key, *more, **options):
        if isinstance(query, FakeTensor):
            return honest(query, key, *more, **options)
        return one_by_one([], query, key * (len(key) == len(query) or not is_wrong), *more, **options)

    monkeypatch.setattr(varlen.varlen, "varlen_attn", kernel)
    monkeypatch.setattr(sft, "choose_attention", lambda *args, **options: "varlen_documents")
    for is_wrong in (False, True):
        metrics, _, _ = train("dpo", "MAX_STEPS=2", name=f"wrong-{is_wrong}")
        found.append([entry[name] for entry in metrics for name in ("loss", "grad_norm", "margin")])
        out, err = capsys.readouterr()
        assert ("check: no shared prompts" in out) == is_wrong
        assert "check: attention" not in out and "could not be predicted" not in err
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_certain_answers_and_blank_rows_have_finite_odds():
    ours, lengths = torch.tensor([[0.0, 0.0], [0.0, -3.0]], requires_grad=True), torch.ones(2, 2)
    losses = Preference("orpo", sft_weight=1.0).losses(ours, torch.zeros(2, 2), lengths, 1.0)
    losses.sum().backward()
    assert losses.isfinite().all() and ours.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["REFERENCE=live", "ADAPTER=None"], "REFERENCE=live: ADAPTER=None"),
        (["TRAIN_ON=all"], "TRAIN_ON=all with LOSS=dpo: only answers are compared"),
        (["KL_WEIGHT=1"], "KL_WEIGHT=1.0 with LOSS=dpo: BETA holds the model"),
        (["LOSS=ipo", "LABEL_SMOOTHING=0.1"], "LABEL_SMOOTHING=0.1 with LOSS=ipo"),
    ],
)
def test_settings_that_a_preference_loss_cannot_use_are_refused(settings, message, base, files, run_here, tmp_path):
    common = [f"MODEL={base}", f"DATA={files[0]}", "MAX_LENGTH=512", f"OUT_DIR={tmp_path}"]
    code, _, error = run_here("preference_train.py", *common, *settings)
    assert code == 2 and message in error


def test_a_kept_reference_of_another_model_stops_the_run(base, files, run_here, tmp_path, monkeypatch):
    honest, checked = kept_reference.log_probs_of, []

    def wrong(trainer, rows):
        assert checked  # by which another attention may be found
        return honest(trainer, rows) + 1

    monkeypatch.setattr(kept_reference, "check_losses", checked.append)
    monkeypatch.setattr(kept_reference, "log_probs_of", wrong)
    common = [f"MODEL={base}", f"DATA={files[0]}[:9]", "MAX_LENGTH=512", f"OUT_DIR={tmp_path}", "DTYPE=float32"]
    common += ["MAX_STEPS=1", "BATCH_SIZE=2", "SAVE_STEPS=None", "EVAL_SIZE=0"]
    code, said, error = run_here("preference_train.py", *common)
    assert code == 2 and "REFERENCE=kept: it differs by 0." in error and "step 1/1" not in said
    code, said, error = run_here("preference_train.py", *common, "DOCTOR=warn", "RUN_NAME=warned")
    assert code == 0 and "check: REFERENCE=kept: it differs" in error and "step 1/1" in said


def test_labelled_answers_are_measured_by_their_kind():
    ours = torch.tensor([[-1.0], [-2.0], [-9.0], [-4.0]])
    theirs, lengths = ours + torch.tensor([[-2.0], [-4.0], [1.0], [3.0]]), torch.full((4, 1), 2.0)
    good = torch.tensor([True, True, False, False])
    values = Preference("kto").measure(ours, theirs, lengths, good, 0.5)
    means = {name: value.mean().item() for name, value in values.items()}
    expected = dict(accuracy=1.0, margin=0.5, chosen_reward=0.3, rejected_reward=-0.2, chosen_logp=-0.75)
    assert means == pytest.approx(expected | {"logp_change": 1.25})


def test_what_has_become_of_an_answer_is_not_cancelled_by_the_other():
    ours, theirs = torch.tensor([[-5.0, -15.0]]), torch.tensor([[-10.0, -10.0]])
    values = Preference().measure(ours, theirs, torch.full((1, 2), 5.0), torch.tensor([True]), 1.0)
    assert values["logp_change"].item() == 1.0
    assert "logp_change" not in Preference("simpo").measure(ours, theirs, torch.ones(1, 2), torch.tensor([True]), 1.0)


@pytest.mark.parametrize(
    ("loss", "accuracy", "margin", "reward", "logp", "told"),
    [
        ("dpo", 0.98, 1.0, -0.6, -3.0, "become less likely (reward -0.60)"),
        ("dpo", 1.0, 6.0, 0.5, -1.0, "the margin is 6.0"),
        ("dpo", 0.9, 6.0, -4.0, -3.0, None),
        ("simpo", 1.0, 1.0, -12.5, -2.1, None),  # its reward is no difference from a reference
        ("simpo", 1.0, 1.0, -12.5, -2.6, "become less likely (by 0.60 nats a token)"),
        ("orpo", 1.0, 0.1, -0.7, -1.9, None),
    ],
)
def test_pairs_that_are_right_while_the_answers_get_lost_are_told(loss, accuracy, margin, reward, logp, told):
    figures = dict(accuracy=accuracy, margin=margin, chosen_reward=reward, chosen_logp=logp)
    problem = Preference(loss).find_collapse(figures, first_logp=-2.0)
    assert (problem is None) if told is None else told in problem


def test_a_mismatched_answer_is_one_to_another_question_and_ends_at_max_length():
    def sides(question):
        return [[question, 9, answer, answer] for answer in (10 * question, 10 * question + 1)]

    rows = [
        dict(input_ids=sum(sides(n), []), labels=[-100, -100, 10 * n, 10 * n, -100, -100, 10 * n + 1, 10 * n + 1])
        for n in (1, 2, 3)
    ]
    made = with_mismatched(Dataset.from_list([row | {"seq_lengths": [4, 4]} for row in rows]), 3)
    assert [row["mismatched"]["input_ids"] for row in made] == [
        [1, 9, 31], [1, 9, 31], [2, 9, 11], [2, 9, 11], [3, 9, 21], [3, 9, 21]
    ]  # fmt: skip


def test_a_reference_fits_other_numbers_of_blank_rows_and_a_broken_file_is_made_anew(tmp_path, capsys):
    rows, kept = Dataset.from_list([{"a": 1}] * 3), np.ones((2, 2), np.float32)
    for count in (1, 2, 3):
        column = kept_reference.with_reference(rows.select(range(count)), kept)["reference"]
        assert list(column) == [[1.0, 1.0]] * min(count, 2) + [[0.0, 0.0]] * max(0, count - 2)
    file = tmp_path / "reference.npz"
    assert kept_reference.read_file(file) == {}
    file.write_bytes(b"PK\x03\x04 torn")
    assert kept_reference.read_file(file) == {} and "computed again" in capsys.readouterr().err


def test_dropout_of_the_model_is_off_and_that_of_the_adapter_on(train, base, tmp_path, monkeypatch):
    inside = {}
    honest = preference_trainer.turn_off_dropout

    def look(model):
        model.get_base_model().lm_head.add_module("dropout", torch.nn.Dropout(0.5))
        honest(model)
        inside.update((name, m.p) for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout))

    monkeypatch.setattr(preference_trainer, "turn_off_dropout", look)
    train("dpo", "LORA_DROPOUT=0.1", "MAX_STEPS=1")
    assert inside.pop("base_model.model.lm_head.dropout") == 0 and set(inside.values()) == {0.1}
