"""The sections of a recipe: every setting of a run, with what is allowed. `rim_dist.recipe` reads and checks a whole one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

StageName = Literal["stage1", "stage2"]
STAGE_NAMES: tuple[StageName, StageName] = ("stage1", "stage2")


class Dropouts(NamedTuple):
    """Probabilities of dropout by place: attention weights, hidden states, inputs of adapters."""

    attention: float = 0.0
    residual: float = 0.0
    lora: float = 0.0


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def around_text(text_format: str, field: str) -> tuple[str, str]:
    """What a format of target texts puts before and after its field, `{step}` or `{answer}`.

    The format is tried: raises ValueError unless every text comes out whole, once.
    """
    name = f"{{{field}}}"
    doubled = "a brace that belongs to the text is written twice"
    found = set()
    for probe in ("\0", "\1\1"):
        try:
            parts = text_format.format(**{field: probe}).split(probe)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            reason = f"{error} is unknown" if isinstance(error, LookupError) else str(error)
            raise ValueError(f"{text_format} cannot be filled in ({reason}); its field is {name}, {doubled}") from None
        if len(parts) == 1 and f"{{{name}}}" in text_format:
            right = text_format.replace(f"{{{name}}}", f"{{{{{name}}}}}")
            raise ValueError(f"{text_format} gives the same text for every {field}; {doubled}: {right}")
        found.add(tuple(parts))
    if len(found) != 1 or len(parts) != 2:
        raise ValueError(f"{text_format} must contain {name} once, as it stands")
    if command := re.search(r"\\[A-Za-z]+$", parts[0]):
        raise ValueError(f"{text_format} loses the braces of {command[0]}; {doubled}: {command[0]}{{{{{name}}}}}")
    return parts[0], parts[1]


class RunSection(Section):
    """What the run is called and where it writes. A run writes only under `OUTPUT_DIR/NAME/`."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200, description="Name of the run's folder.")
    output_dir: str = Field("runs", min_length=1, description="Folder that holds the run's folder.")
    seed: StrictInt = Field(0, ge=0, description="Seeds initial weights, data order and dropout.")
    accept_changes: list[Literal["data", "tokenizer", "template", "deepspeed", "weights"]] = Field(
        default_factory=list,
        description="Inputs that may differ from those of the run's earlier starts (docs/checkpoints.md).",
    )


class LoraSection(Section):
    """Low-rank adapters (peft). The paper uses rank 128 and does not state the rest."""

    rank: StrictInt = Field(128, ge=1, description="Rank of the adapters.")
    alpha: float = Field(256.0, gt=0, description="Scale: updates are multiplied by alpha / rank.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of the adapters' inputs, in every stage that does not set `lora_dropout`."
    )
    target_modules: str | list[str] = Field(
        "all-linear", description="Module names that get adapters, or `all-linear` (every linear layer but the head)."
    )


class ModelSection(Section):
    """The language model: an existing one (`init_from`) or a new one (`config`)."""

    init_from: str | None = Field(
        None,
        min_length=1,
        description="HF folder, hub id, or a rim_dist checkpoint (or run) folder whose weights the run starts from.",
    )
    config: dict[str, Any] | None = Field(
        None, description="For training from scratch: `model_type` and the fields of that transformers config."
    )
    tokenizer: str | None = Field(
        None,
        description="HF folder, hub id, SentencePiece `.model` file, or `synthetic` (the tokenizer of the embedded "
        "task). Default: the one beside `init_from`.",
    )
    revision: str | None = Field(None, description="Hub revision of `init_from`.")
    trust_remote_code: StrictBool = Field(False, description="Run Python code that comes with the model.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of forward and backward; the optimizer always keeps fp32 weights. `auto` is bf16 on GPUs that "
        "have it, fp32 elsewhere; a run keeps what it was at its first start.",
    )
    tf32: StrictBool = Field(
        False, description="On a GPU, multiply fp32 matrices with TF32's 10 bits: faster, and no longer exact to fp32 rounding."
    )
    cudnn_attention: StrictBool = Field(
        False,
        description="Let PyTorch take cuDNN's attention on a GPU. It plans anew for every shape, and packed rows have many.",
    )
    attention: str = Field(
        "auto",
        description="The attention kernel, a file of `rim_dist/attention/kernels` (below); all compute the same. `auto` "
        "chooses one and says why in the log.",
    )
    activation_checkpointing: StrictBool = Field(
        False, description="Recompute each layer in the backward pass instead of keeping its activations."
    )
    activation_offload: StrictBool = Field(
        False, description="With activation_checkpointing: keep what is left of a layer, its input, in CPU memory."
    )
    lora: LoraSection | None = Field(None, description="Train adapters and the memory rows only. Null: full fine-tuning.")

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.init_from is None) == (self.config is None):
            raise ValueError("give exactly one of init_from (an existing model) and config (from scratch)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example llama")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model from scratch needs tokenizer")
        if self.activation_offload and not self.activation_checkpointing:
            raise ValueError("activation_offload needs activation_checkpointing")
        if self.lora is not None and self.config is not None:
            raise ValueError("lora needs init_from: adapters on random weights train nothing useful")
        return self


class MemorySection(Section):
    """The memory blocks: `[begin, memory x tokens_per_block, end]`, repeated."""

    blocks: StrictInt = Field(
        8, ge=0, description="K: blocks of every sample in stage 2, and of the exported prompt. Stage 1 uses a block a step."
    )
    tokens_per_block: StrictInt = Field(2, ge=0, description="M: memory tokens between begin and end of a block.")
    inside_block: Literal["causal", "bidirectional"] = Field(
        "causal",
        description="Whether tokens of a block see only earlier ones or the whole block. `bidirectional` is an experiment: an "
        "ordinary server cannot reproduce it, so it is not exported.",
    )
    begin_token: str = Field("<|mem_begin|>", min_length=1, description="Opens a block. A token the vocabulary has is reused.")
    memory_token: str = Field("<|mem|>", min_length=1, description="The memory token. A token the vocabulary has is reused.")
    end_token: str = Field("<|mem_end|>", min_length=1, description="Closes a block. A token the vocabulary has is reused.")
    initialise: Literal["auto", "mean", "keep"] = Field(
        "auto",
        description="Start of the memory rows: `mean` of the old rows with a little seeded noise, `keep` what the model "
        "has; `auto` is `mean` for added rows and `keep` for reused ones.",
    )

    @model_validator(mode="after")
    def _distinct(self) -> MemorySection:
        if len({self.begin_token, self.memory_token, self.end_token}) != 3:
            raise ValueError("begin_token, memory_token and end_token must differ")
        return self


class ColumnsSection(Section):
    """Names of the columns of a JSONL, Parquet or hub source."""

    question: str = Field("question", description="Column of the question (text).")
    steps: str | None = Field(
        "steps",
        description="Column of the steps (a list of texts, or one text with a step a line)."
        " Another name than `steps` is refused where no row has it.",
    )
    answer: str = Field("answer", description="Column of the answer (text or number).")


class SyntheticSection(Section):
    """The embedded task: walks through a house with a fixed map (docs/synthetic.md)."""

    samples: StrictInt = Field(100_000, ge=1, description="Problems in the training set.")
    min_steps: StrictInt = Field(1, ge=1, description="Shortest walk.")
    max_steps: StrictInt = Field(5, ge=1, description="Longest walk; evaluation asks only for this one.")
    step_text: Literal["equation", "room"] = Field(
        "equation",
        description="A step is `equation`, room, door and the room behind it, as in GSM8K-Aug; or `room`, the room behind the "
        "door, with which a run may not learn: the first block then has two look-ups to learn at once (docs/synthetic.md).",
    )

    @model_validator(mode="after")
    def _ordered(self) -> SyntheticSection:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps {self.min_steps} is above max_steps {self.max_steps}")
        return self


class DataSection(Section):
    """Where samples (question, steps, answer) come from and what is done with bad ones."""

    source: str = Field(
        "synthetic",
        description="The format of `path`, a file of `rim_dist/data/formats` (below); `hub`: a data set id; `synthetic`: the "
        "embedded task.",
    )
    path: str | None = Field(None, description="File of the source (all but synthetic and hub).")
    id: str | None = Field(None, description="Data set id on the hub.")
    config_name: str | None = Field(None, description="Configuration of the hub data set.")
    split: str = Field("train", description="Split of the hub data set.")
    revision: str | None = Field(None, description="Revision of the hub data set.")
    layout: Literal["columns", "gsm8k", "gsm8k_aug"] = Field(
        "columns",
        description="How a hub row is read: `columns`, `gsm8k` (steps and answer inside the answer column), or "
        "`gsm8k_aug` (a `text` column with the text format).",
    )
    columns: ColumnsSection = Field(default_factory=ColumnsSection, description="Column names.")
    streaming: StrictBool = Field(
        False, description="Read a hub, JSONL or Parquet source as a stream; totals and epochs are then unknown."
    )
    shuffle_buffer: StrictInt = Field(10_000, ge=1, description="Samples in the seeded shuffle buffer of a stream.")
    limit: StrictInt | None = Field(None, ge=1, description="Use only the first so many rows.")
    on_bad_sample: Literal["refuse", "skip"] = Field(
        "refuse",
        description="A row that cannot be used (a column missing, not UTF-8, a number beyond floating point, too long) ends "
        "the command, or is skipped and counted with its reason.",
    )
    max_tokens: StrictInt | None = Field(
        None,
        ge=1,
        description="Longest plain sequence (question, blocks, target) in tokens; longer samples are bad samples. "
        "Default: the model's positions.",
    )
    step_format: str = Field("{step}", description="Target text of a step; a brace of the text itself is written twice.")
    answer_format: str = Field(
        "#### {answer}",
        description="Target text of the answer; scoring reads answers by it (docs/evaluation.md). A brace of the text itself "
        "is written twice: `\\boxed{{{answer}}}`.",
    )
    synthetic: SyntheticSection = Field(default_factory=SyntheticSection, description="The embedded task.")
    cache_dir: str | None = Field(
        None, description="Folder for tokenised data, shared between runs. Default: `data/` in the run's folder."
    )

    @model_validator(mode="after")
    def _complete(self) -> DataSection:
        if self.source not in ("synthetic", "hub") and self.path is None:
            raise ValueError(f"source {self.source} needs path")
        if self.source == "hub" and self.id is None:
            raise ValueError("source hub needs id")
        return self

    @field_validator("step_format", "answer_format")
    @classmethod
    def _keeps_the_text(cls, value: str, info: ValidationInfo) -> str:
        around_text(value, str(info.field_name).removesuffix("_format"))
        return value


class StageSection(Section):
    """One stage: its length and its optimisation. Both samples and epochs empty or 0: the stage is left out."""

    samples: StrictInt | None = Field(None, ge=0, le=10**12, description="Samples the stage consumes (instead of epochs).")
    epochs: float | None = Field(None, ge=0, le=1e4, description="Passes over the data (instead of samples).")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate after warm-up.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="Learning rate after warm-up: constant, or down to 0 by a cosine or a line."
    )
    warmup_fraction: float = Field(0.04, ge=0, lt=1, description="Fraction of the stage's steps in which the rate rises.")
    lora_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout of the adapters' inputs in this stage. Null: `model.lora.dropout`."
    )
    attention_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of attention weights in this stage. FlexAttention has none (`model.attention`)."
    )
    residual_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout of hidden states in this stage, wherever the family has one (embedding, residual, MLP).",
    )

    @model_validator(mode="after")
    def _one_length(self) -> StageSection:
        if self.samples is not None and self.epochs is not None:
            raise ValueError("give samples or epochs, not both")
        return self

    @property
    def enabled(self) -> bool:
        return bool(self.samples or self.epochs)


class Stage1Section(StageSection):
    """Grounding: a block for each step; readout t predicts step t + 1, the last one the answer."""

    max_steps: StrictInt = Field(13, ge=1, description="Most steps of a sample.")
    longer: Literal["skip", "truncate"] = Field(
        "skip", description="Samples with more steps are left out (and counted), or keep their first max_steps steps."
    )
    targets: Literal["next_step", "same_step"] = Field(
        "next_step",
        description="`next_step`: T blocks, target(t) = step t + 1, the last one the answer. `same_step`: T + 1 blocks, "
        "target(t) = step t, the last one the answer. The paper does not settle this.",
    )
    weights: Literal["relative", "absolute", "constant"] = Field(
        "relative",
        description="lambda of the t-th of T targets at fraction u of the stage: `relative` max(0, 1 - u T / t), `absolute` "
        "max(0, 1 - u max_steps / t), `constant` 1. The answer always weighs 1. The paper does not settle this.",
    )


class Stage2Section(StageSection):
    """Refinement: K blocks for every sample; every readout predicts the answer."""

    weight_power: float = Field(
        1.0,
        ge=0,
        description="p in alpha of block k = k^p / sum of j^p: 1 is the paper's 2k / (K (K + 1)), 0 the same for every block; "
        "more asks less of early blocks.",
    )


class CurriculumSection(Section):
    """The stages. Every method goes through them with targets of its own (docs/baselines.md)."""

    stage1: Stage1Section = Field(default_factory=Stage1Section, description="Grounding.")
    stage2: Stage2Section = Field(default_factory=Stage2Section, description="Refinement.")
    normalisation: Literal["weight", "sample"] = Field(
        "weight",
        description="The loss of an optimizer step is the weighted sum over tokens divided by the total `weight` of its "
        "tokens, or by its number of samples (the paper's formula as written).",
    )

    def stage(self, name: StageName) -> Stage1Section | Stage2Section:
        return self.stage1 if name == "stage1" else self.stage2


class CoconutSection(Section):
    """Method `coconut` (docs/baselines.md): how the chain gives way to continuous thoughts in the course of stage 1."""

    c_thought: StrictInt = Field(2, ge=1, description="Continuous thoughts for each step they replace.")
    max_latent_stage: StrictInt = Field(
        3, ge=1, description="L: most steps that thoughts replace; stage 1 runs the latent stages 0 .. L."
    )
    epochs_per_stage: float | None = Field(
        None,
        gt=0,
        description="Passes over the data of each latent stage; the last one takes the rest. Null: stages of equal length.",
    )
    uniform_prob: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Mixed-stage data: fraction of the samples whose latent stage is drawn from 0 .. their steps.",
    )
    reset_optimizer: StrictBool = Field(True, description="Every latent stage begins with a new optimizer.")


class OptimizerSection(Section):
    """AdamW and the batch."""

    global_batch: StrictInt = Field(128, ge=1, description="Samples of an optimizer step, over all ranks.")
    micro_batch_tokens: StrictInt = Field(
        8192,
        ge=1,
        description="Most tokens of a packed row, which one forward pass runs on a rank (on all ranks of a sequence group "
        "together): samples are packed up to it. No effect on the result; a sample whose row is longer is a bad sample.",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay (matrices only, not norms and biases).")
    gradient_clipping: float = Field(1.0, ge=0, description="Largest gradient norm; 0 switches clipping off.")
    grad_accum_dtype: Literal["auto", "fp32", "model"] = Field(
        "auto",
        description="Precision in which gradients of micro-batches are added up: `fp32`, or the `model`'s own. `auto` is fp32, "
        "but the model's under ZeRO-0, where DeepSpeed has no other.",
    )


class ParallelSection(Section):
    """How the model is spread over ranks."""

    zero_stage: StrictInt = Field(3, ge=0, le=3, description="DeepSpeed ZeRO stage.")
    offload: StrictBool = Field(False, description="ZeRO-3 with optimizer and parameters in CPU memory.")
    zero_plus_plus: StrictBool = Field(
        False,
        description="ZeRO++ (arXiv 2306.10209) on GPUs: a copy of the parameters in every node, weights and gradients "
        "quantised on the way. Rounds what is sent: not exact.",
    )
    tensor: StrictInt = Field(
        1,
        ge=1,
        description="Tensor parallel degree: ranks that split every layer's matrices. Must divide the attention and key/value "
        "heads; best within a node.",
    )
    sequence: StrictInt = Field(
        1, ge=1, description="Sequence parallel degree: ranks that split a packed row, memory blocks included."
    )
    sequence_mode: Literal["auto", "ulysses", "allgather_kv"] = Field(
        "auto",
        description="How the ranks compute a row's attention: `ulysses` exchanges heads for tokens (heads must divide), "
        "`allgather_kv` gathers keys and values (any number of heads); `auto` is `ulysses` where it can be.",
    )
    deepspeed_config: str | None = Field(
        None, description="A DeepSpeed JSON of your own instead of `ds_configs/`; keys the trainer owns are refused."
    )
    timeout_seconds: float = Field(1800.0, gt=0, description="A collective that takes longer ends the run.")
    preflight: StrictBool = Field(
        True,
        description="Before anything large is built: compare versions, recipe and data of all ranks, time their network, run a "
        "tiny split model and one batch without weight; `preflight.json` has the result.",
    )
    preflight_seconds: float = Field(
        60.0, gt=0, description="A check of the preflight that takes longer ends the run and names who did not come to it."
    )

    @model_validator(mode="after")
    def _offload_needs_zero3(self) -> ParallelSection:
        for name in ("offload", "zero_plus_plus"):
            if getattr(self, name) and self.zero_stage != 3:
                raise ValueError(f"{name} needs zero_stage 3, not {self.zero_stage}")
        if self.zero_plus_plus and (self.offload or self.tensor > 1):
            raise ValueError("zero_plus_plus cannot be combined with offload or tensor above 1")
        return self


class CheckpointSection(Section):
    """When the state is saved, and how much of it is kept."""

    every_steps: StrictInt = Field(500, ge=0, description="Save after so many optimizer steps; 0: only at the end of a stage.")
    keep: StrictInt = Field(2, ge=1, description="The newest so many complete checkpoints are kept.")
    keep_every_steps: StrictInt = Field(0, ge=0, description="Checkpoints of every so many steps are kept as well; 0: none.")
    keep_stage_ends: StrictBool = Field(False, description="The last checkpoint of every stage is kept as well.")
    keep_best: StrictInt = Field(0, ge=0, description="So many of the best checkpoints by `metric` are kept as well.")
    metric: Literal["accuracy", "any_block_accuracy", "loss"] = Field(
        "accuracy",
        description="What `best` means: an evaluation at the checkpoint's step (highest) or the step's loss (lowest).",
    )
    background: StrictBool = Field(
        False,
        description="Copy the state to CPU memory and write it while training goes on. Needs CPU memory for one more copy of "
        "each rank's parameters and optimizer.",
    )


class EvaluationSection(Section):
    """Accuracy during training, generated exactly as an unmodified server would."""

    every_steps: StrictInt = Field(0, ge=0, description="Evaluate after so many optimizer steps; 0: only at the end.")
    at_end: StrictBool = Field(True, description="Evaluate after the last step.")
    samples: StrictInt = Field(264, ge=1, description="Questions to ask (the first ones of the data).")
    batch: StrictInt = Field(64, ge=1, description="Questions answered together.")
    data: str | None = Field(
        None,
        description="File of the evaluation questions, or `synthetic[:SEED]`. Default: `synthetic` for synthetic "
        "training data, none otherwise.",
    )
    format: str = Field("auto", description="Format of the evaluation file; `auto` recognises it.")
    max_new_tokens: StrictInt = Field(32, ge=1, description="Most tokens of an answer (chains of thought: 16 times as many).")


class LoggingSection(Section):
    """What is reported besides `metrics.jsonl`, which is always written."""

    every_steps: StrictInt = Field(10, ge=1, description="Print a progress line after so many steps (not on a terminal).")
    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases.")

    @field_validator("wandb", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    wandb_project: str = Field("rim_dist", description="Project of the W&B run.")
    tensorboard: StrictBool = Field(False, description="Write TensorBoard events (needs the tensorboard package).")
    profile: tuple[StrictInt, StrictInt] | None = Field(
        None, description="[FIRST, LAST] optimizer steps to record with torch.profiler, written to `report/`."
    )

    @field_validator("profile")
    @classmethod
    def _in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError(f"{list(value)} is not allowed; allowed: 1 <= FIRST <= LAST")
        return value


class Recipe(Section):
    """A complete run."""

    method: str = Field("rim", description="What is trained: a file of `rim_dist/methods` (docs/baselines.md).")
    run: RunSection = Field(default_factory=RunSection, description="Name and folder.")
    model: ModelSection = Field(description="The model.")
    memory: MemorySection = Field(default_factory=MemorySection, description="The memory blocks.")
    data: DataSection = Field(default_factory=DataSection, description="The data.")
    curriculum: CurriculumSection = Field(default_factory=CurriculumSection, description="The stages.")
    coconut: CoconutSection = Field(default_factory=CoconutSection, description="Method `coconut`.")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="Optimizer and batch.")
    parallel: ParallelSection = Field(default_factory=ParallelSection, description="ZeRO and parallel degrees.")
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="Saving.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="Evaluation.")
    logging: LoggingSection = Field(default_factory=LoggingSection, description="Logging.")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not (self.curriculum.stage1.enabled or self.curriculum.stage2.enabled):
            raise ValueError("curriculum: no stage has samples or epochs; there is nothing to train")
        if self.data.streaming:
            for name in STAGE_NAMES:
                if self.curriculum.stage(name).epochs:
                    raise ValueError(f"curriculum.{name}.epochs: a stream has no known length; give samples")
        if self.accumulates_in_fp32 and self.parallel.zero_stage == 0:
            raise ValueError(
                f"optimizer.grad_accum_dtype: fp32 needs parallel.zero_stage 1, 2 or 3 with model.dtype {self.model.dtype}: "
                "DeepSpeed has it only there"
            )
        return self

    def with_dtype(self, dtype: Literal["fp32", "bf16"]) -> Recipe:
        """The recipe with a precision in the place of `model.dtype: auto`."""
        if self.model.dtype != "auto":
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"dtype": dtype})})

    @property
    def accumulates_in_fp32(self) -> bool:
        """Whether gradients of a 16-bit model are added up in fp32."""
        return self.accumulates_in_fp32_under(self.parallel.zero_stage)

    def accumulates_in_fp32_under(self, zero_stage: int) -> bool:
        """The same under a ZeRO stage."""
        half, wanted = self.model.dtype in ("bf16", "fp16"), self.optimizer.grad_accum_dtype
        return half and (wanted == "fp32" or (wanted == "auto" and zero_stage > 0))

    @property
    def trained_stages(self) -> list[StageName]:
        """The stages that are not left out, in order."""
        return [name for name in STAGE_NAMES if self.curriculum.stage(name).enabled]

    def dropouts(self, name: StageName) -> Dropouts:
        """The dropout of a stage by place."""
        stage, lora = self.curriculum.stage(name), self.model.lora
        adapters = 0.0 if lora is None else lora.dropout if stage.lora_dropout is None else stage.lora_dropout
        return Dropouts(stage.attention_dropout, stage.residual_dropout, adapters)

    @property
    def largest_dropouts(self) -> Dropouts:
        """The largest dropout, by place, of the stages that are trained."""
        return Dropouts(*map(max, zip(*map(self.dropouts, self.trained_stages), strict=True)))

    @property
    def exportable(self) -> bool:
        """Whether an ordinary causal server can run what is trained."""
        return self.memory.inside_block == "causal"

    @property
    def folder(self) -> Path:
        """The run's folder: all that the run writes is below it."""
        return Path(self.run.output_dir) / self.run.name
