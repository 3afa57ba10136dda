"""The stages that the training scripts share: tokenizer and template, data, memory, training."""

import contextlib
import copy
import functools
import json
import math
import statistics
from dataclasses import dataclass

import torch
from transformers import set_seed

from common import cuda, hardware
from common.cli import RANK, UserError
from common.data import checks, prepare, templates
from common.data.account import describe
from common.data.compared import RowSize, size_of
from common.data.encoder import ChatEncoder
from common.eval import facts
from common.files import write_atomic
from common.model import load
from common.model.adapters import load_adapter
from common.model.attention import can_pack, can_share_prompts, choose_attention
from common.model.liger import apply_kernels, choose_kernels, swap
from common.model.location import Source
from common.train import batch_plan, config, optimizers
from common.train.compiled import compile_layers
from common.train.galore import GaLore
from common.train.kept_reference import keep_reference
from common.train.loss import router_loss_weight
from common.train.memory import Step
from common.train.meta_model import empty_adapter, empty_model
from common.train.preference import Preference
from common.train.preference_trainer import PreferenceTrainer
from common.train.trainer import ChatTrainer, GaloreTrainer

KEEPS_BASE = ("lora", "dora", "rslora", "ia3")  # PiSSA and LoftQ change the base's weights


@dataclass
class Job:
    """What a training script has before it has a model."""

    settings: dict
    trainer_settings: dict  # the same, with OPTIM as transformers calls it
    source: Source
    dtype: torch.dtype
    attention: str
    tokenizer: object
    encoder: ChatEncoder
    kl_weight: float
    probe: object  # see facts.make_probe
    has_kernels: bool  # Liger's
    preference: Preference | None  # None: ordinary chats
    train_set: object = None  # datasets.Dataset of input_ids and labels; load_data fills in these four
    eval_set: object = None
    data_digest: str = ""
    row_length: int = 0  # tokens of the longest row; of pairs, of a mean one
    pairs: tuple[RowSize, ...] = ()  # of the train_set

    def empty_model(self, quantization: str | None = None, attention: str = "eager"):
        """The base on the meta device, without its adapter. attention: any model has the default."""
        model_config, vocabulary = load.load_config(self.source), len(self.tokenizer)
        return empty_model(model_config, quantization, self.dtype, attention, vocabulary)

    def shares_prompts(self) -> bool:
        """Whether the prompt of a pair is computed once for both answers."""
        if not (self.settings["PACKING"] and self.preference.is_paired):
            return False
        rows = [*self.train_set["seq_lengths"], *(self.eval_set["seq_lengths"] if self.eval_set else ())]
        return can_share_prompts(load.load_config(self.source), self.attention, max(map(max, rows)))

    def has_reference(self, kind: str) -> bool:
        """Whether the loss compares with a reference of this kind, live or kept."""
        needed = self.preference is not None and self.preference.needs_reference
        return needed and self.settings["REFERENCE"] == kind

    @property
    def is_full(self) -> bool:
        """Whether all parameters are trained, so that KL_WEIGHT needs a second, frozen model."""
        return self.settings.get("ADAPTER") is None

    def frozen_base(self, model):
        """What KL_WEIGHT compares with beside a model without an adapter; else None."""
        return copy.deepcopy(model).requires_grad_(False) if self.is_full and self.kl_weight else None


def start(settings: dict, source: Source, dtype, reference: Source | None, trainer_settings=None) -> Job:
    """Settings, tokenizer and template checked: every mistake that can be found without the weights.

    reference: the model towards which KL_WEIGHT pulls; None where its predictions cannot be had.
    """
    trainer_settings = trainer_settings or settings
    config.check_combinations(trainer_settings)
    load.check_length(source, settings["MAX_LENGTH"])
    tokenizer = load.load_tokenizer(source)
    base = tokenizer if reference == source else reference and load.load_tokenizer(reference)
    base_template = base and base.chat_template
    model_config = load.load_config(source)
    preference, kl_weight = choose_preference(settings, source), 0.0
    if preference is None:  # which has a pull towards its reference of its own
        kl_weight = config.choose_kl_weight(settings, bool(base_template), reference is not None)
    if weight := router_loss_weight(model_config):
        print(f"balance of the experts: weight {weight}; logged as router_loss, not part of loss and eval_loss")
    if settings["PACKING"] and not can_pack(model_config, settings["MAX_LENGTH"]):
        print(f"PACKING=False: {model_config.model_type} cannot keep the chats of a row apart")
        settings, trainer_settings = ({**each, "PACKING": False} for each in (settings, trainer_settings))
    encoder, note = templates.set_template(
        tokenizer, settings["CHAT_TEMPLATE"], settings["TEMPLATE_OPTIONS"], settings["TRAIN_ON"]
    )
    print(note)
    probe = facts.make_probe(settings["EVAL_FACTS"], settings["EVAL_PROMPTS"], tokenizer)
    attention = choose_attention(model_config, settings["ATTN_IMPLEMENTATION"], settings["PACKING"], dtype=dtype)
    if settings["TORCH_COMPILE"] and attention in ("sdpa_documents", "eager_documents"):
        # Attention one document after the other would be compiled again for every length of a document.
        attention = choose_attention(model_config, settings["ATTN_IMPLEMENTATION"])
    products = ", products in TF32" * cuda.uses_tf32(dtype)
    has_kernels, kernels = choose_kernels(settings["LIGER_KERNEL"], model_config, dtype, settings["TORCH_COMPILE"])
    print(f"{hardware.device_name()}: {str(dtype).removeprefix('torch.')}{products}, attention {attention}{kernels}")
    what = source, dtype, attention, tokenizer, encoder, kl_weight, probe, has_kernels, preference
    job = Job(settings, trainer_settings, *what)
    if source.adapter:  # one that does not fit is found here
        with contextlib.suppress(NotImplementedError):  # of FRoD and SHiRA, which look at the weights
            load_adapter(job.empty_model(), source.adapter)
    return job


def choose_preference(settings: dict, source: Source) -> Preference | None:
    """The preference loss that settings name; None for training on ordinary chats."""
    if "LOSS" not in settings:
        return None
    preference = Preference.of(settings)
    reference = settings["REFERENCE"] if preference.needs_reference else "none"
    if reference == "live" and not keeps_base(settings, source):
        problem = f"ADAPTER={settings['ADAPTER']} on {settings['MODEL']} changes the base or goes on from an adapter"
        raise UserError(f"REFERENCE=live: {problem}. Set REFERENCE=kept.")
    print(f"preference loss: {preference.loss}, SFT_WEIGHT={preference.sft_weight:g}, reference: {reference}")
    return preference


def keeps_base(settings: dict, source: Source) -> bool:
    """Whether the model without its new adapter is the base."""
    return settings.get("ADAPTER") in KEEPS_BASE and not source.adapter


def load_data(job: Job, run, trained_rows: list[int]) -> None:
    """Encode the chats, or read them as they were encoded, and check what would be learned from them.

    run: a run.TrainingRun. trained_rows: token ids whose embeddings are trained.
    """
    settings, keep_unlearned = job.settings, bool(job.kl_weight)  # KL_WEIGHT uses chats without an answer to learn
    manifest = run.checkpoint[1] if run.checkpoint and run.keeps_data else None
    datasets = prepare.datasets_for(settings, job.encoder, run.folder / "data", keep_unlearned, manifest)
    job.train_set, job.eval_set, account = datasets
    print(describe(account))
    config.check_evaluations(settings, bool(job.eval_set))
    shown = checks.examine(job.train_set, job.tokenizer, job.encoder, settings, keep_unlearned, trained_rows)
    if not RANK:
        (run.folder / "data").mkdir(exist_ok=True)
        write_atomic(run.folder / "data" / "examples.json", json.dumps({"examples": shown}))  # for report.html
    longest = account["length_percentiles"]["100"]
    if job.preference:
        shares = job.shares_prompts()
        job.pairs = tuple(size_of(row, shares) for row in job.train_set.with_format("numpy"))
        longest = math.ceil(statistics.fmean(sum(pair.shape) for pair in job.pairs))
    elif settings["PACKING"]:
        longest = settings["MAX_LENGTH"]
    job.row_length, job.data_digest = min(longest, account["tokens"]), account["digest"]


def train(job: Job, run, build, make_optimizer=None) -> None:
    """Plan the batch, then build, train and report; again in smaller parts where memory runs out all the same.

    build: called with a function that loads the base; returns the model to train. make_optimizer: called with that
    model; None where OPTIM names one of transformers'.
    """
    settings, adapter = job.settings, job.source.adapter

    def build_meta(quantization):
        empty = functools.partial(job.empty_model, quantization, job.attention)
        model = build(lambda: empty_adapter(empty(), adapter) if adapter else empty())
        base = job.frozen_base(model)  # with transformers' own code
        if job.has_kernels:
            apply_kernels(model)
        return model, base

    packing, device = settings["PACKING"], hardware.device_type()
    kind = dict(full=job.is_full, offloads=settings["ACTIVATION_OFFLOADING"], has_reference=job.has_reference("live"))
    step = Step(1, job.row_length, packing, job.kl_weight, job.dtype, device, pairs=job.pairs, **kind)
    optim, ratio = job.trainer_settings["OPTIM"], settings.get("LORA_PLUS_RATIO")
    optimizer = make_optimizer or functools.partial(optimizers.make_optimizer, optim, lora_plus_ratio=ratio)
    print("memory: tracing a training step")
    plan = batch_plan.plan_batch(settings, build_meta, optimizer, step, run.checkpoint)
    batch_plan.restart_smaller(lambda plan: train_as_planned(job, run, build, make_optimizer, plan), plan, settings)


def train_as_planned(job: Job, run, build, make_optimizer, plan) -> None:
    """Build the model and its trainer, and execute the run."""
    settings = job.settings
    set_seed(settings["SEED"])
    arguments = job.source, settings.get("QUANTIZATION"), job.dtype, job.attention
    model = build(lambda: load.load_model(*arguments, trainable=True, vocabulary=len(job.tokenizer)))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{job.source.name}: {trainable:,} trainable parameters")
    base = job.frozen_base(model)
    kernels = apply_kernels(model) if job.has_kernels else []
    precision = "high" if cuda.uses_tf32(job.dtype) else "highest"
    with cuda.float32_products(precision), contextlib.ExitStack() as afterwards:
        afterwards.callback(swap, kernels)  # for another run in this process
        trainer = make_trainer(job, run, plan, model, base, make_optimizer and make_optimizer(model))
        trainer.kernels = kernels

        def save(folder, weights):
            load.save_final(folder, trainer.model, job.tokenizer, model.base_fingerprint, weights)

        run.execute(trainer, plan, save)


def make_trainer(job: Job, run, plan, model, base, optimizer):
    """The trainer of a model, beside its frozen base or None; optimizer: None for one of transformers'."""
    settings = job.settings
    kind, options = GaloreTrainer if isinstance(optimizer, GaLore) else ChatTrainer, {}
    if job.preference:
        shares = any(pair.shape[0] for pair in job.pairs)
        kind, options = PreferenceTrainer, {"preference": job.preference, "shares_prompts": shares}
    trainer = kind(
        model=model,
        args=config.trainer_config(job.trainer_settings, plan, run.folder, job.dtype, evaluate=bool(job.eval_set)),
        train_dataset=job.train_set,
        eval_dataset=job.eval_set,
        processing_class=job.tokenizer,
        optimizers=(optimizer, None),
        settings=settings,
        kl_weight=job.kl_weight,
        base_model=base,
        probe=job.probe,
        log=run.log,
        metadata=run.metadata | {"plan": plan.settings(), "predicted_peak_gib": plan.predicted_peak_gib},
        keep_best=job.trainer_settings["KEEP"] != "last",
        patience=settings["EARLY_STOPPING_PATIENCE"],
        save_total_limit=settings["SAVE_TOTAL_LIMIT"],
        data_digest=job.data_digest,
        base_fingerprint=model.base_fingerprint,
        has_new_adapter=keeps_base(settings, job.source),
        **options,
    )
    if settings["TORCH_COMPILE"]:
        compile_layers(trainer.model)
    if job.has_reference("kept"):
        keep_reference(trainer, run.folder / "data", job.source.adapter)
    return trainer
