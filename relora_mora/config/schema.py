"""The typed settings of a run. Names carry units, and every default is what a user of the paper's method wants.

``Strict`` refuses unknown keys and wrong types. Checks that involve several settings are in ``checks``.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

from relora_mora.config.checks.deepspeed import DeepSpeed
from relora_mora.config.data import DataConfig
from relora_mora.config.optim import OptimConfig
from relora_mora.config.registry import METHODS, OPERATORS, Method
from relora_mora.config.shipped import MODELS, find_config
from relora_mora.config.types import (
    LONGEST_SECONDS,
    Decay,
    FilePath,
    Fixed,
    Fraction,
    Free,
    HomePath,
    NotNegative,
    Positive,
    Project,
    Resume,
    Seed,
    Strict,
    Text,
    Whole,
)

if TYPE_CHECKING:
    MethodName = str
    MoraType = int
else:  # a type checker does not accept choices that are known only at run time
    MethodName = Literal[tuple(METHODS)]
    MoraType = Literal[tuple(OPERATORS)]


ModelFile = Annotated[FilePath, AfterValidator(lambda path: str(find_config(path, MODELS)))]
DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all of a LLaMA


class ModelConfig(Strict):
    """The model. ``config`` is a transformers config in JSON, and ``overrides`` replaces some of its keys."""

    config: Free[ModelFile | None] = None
    """the config.json of a causal language model of transformers, relative to the current folder or else to this YAML
    file, or the name of a shipped one; null: the config of init_from"""
    overrides: Free[dict[str, Any]] = Field({})
    """keys of that config to replace, e.g. {hidden_size: 256}"""
    init_from: Free[HomePath | None] = None
    """the initial weights: a Hugging Face folder of a causal language model, or a checkpoint or run folder of any
    method"""
    adapter: Free[HomePath | None] = None
    """the initial adapters, which were trained on the model in init_from: a folder in the layout of PEFT or of the
    released MoRA code"""
    new_tokens: Free[Literal["mean_of_pieces", "mean", "normal"] | None] = None
    """initial rows for tokens that the tokenizer of init_from lacks, in embeddings and head: the mean of the rows of a
    token's old pieces, or of all old rows, or drawn with their mean and deviation; the vocabulary grows to a multiple
    of 64, or to model.overrides.vocab_size; null: there are none"""
    attention: Free[Literal["auto", "sdpa", "eager", "flash_attention_2"]] = "auto"
    """transformers' attention implementation; auto: the one that transformers takes for the model"""
    activation_checkpointing: Free[bool] = False
    """recompute each decoder layer in the backward pass instead of keeping its activations"""
    compile: Free[bool | Literal["auto"]] = "auto"
    """torch.compile the decoder layers, on ZeRO 0-2; auto: on GPUs; see docs/performance.md"""


class TokenizerConfig(Strict):
    path: Free[FilePath | None] = None
    """a folder with tokenizer.model, a sentencepiece .model file, or a Hugging Face tokenizer folder; null: the
    tokenizer of model.init_from"""


class MethodConfig(Strict):
    """What trains. ``full`` trains all weights; the other methods freeze the decoder's linears and train adapters."""

    name: Fixed[MethodName] = Field(
        "remora", description=", ".join(f"{m.name} ({m.note})" if m.note else m.name for m in METHODS.values())
    )
    rank: Fixed[Positive] = 128
    """LoRA's rank r; MoRA's square has as many parameters: R = floor(sqrt((in + out) r))"""
    rank_pattern: Fixed[dict[str, Positive]] = Field({})
    """ranks that differ from rank, by projection, e.g. {down_proj: 64}"""
    square_size: Fixed[Positive | None] = None
    """R of every layer; null: R follows from rank"""
    square_rounding: Fixed[Literal["down", "nearest"]] = "down"
    """how R is rounded; nearest: as in the released code; may exceed LoRA's parameter count"""
    square_multiple: Fixed[Positive] = 1
    """round R down to a multiple of this (8, 16, 32 suit matrix units)"""
    operators: list[MoraType] = Field([1, 2], min_length=1)
    """MoRA types: mora uses the first, remora cycles through all"""
    lora_alpha: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] | None = None
    """LoRA's scale is alpha / r; null: alpha = r"""
    target_modules: Fixed[Annotated[list[str], Field(min_length=1)] | None] = None
    """linears of the decoder layers that get an adapter, such as [q_proj, v_proj]; null: all"""
    train_linears: Fixed[bool | None] = None
    """train the decoder's linears that have no adapter; null: if embeddings, norms or head train"""
    train_experts: Fixed[bool] = False
    """train experts and routers of a mixture of experts, which have no adapters"""
    train_embeddings: Fixed[bool | Literal["new"] | Positive] = True
    """train the input embeddings; new: only the rows of model.new_tokens, in the head, too; a number: only the rows
    from this id on"""
    train_norms: Fixed[bool] = True
    """train the norms, and the biases if the model has any"""
    train_head: Fixed[bool] = True
    """train the output head"""
    form: Free[Literal["auto", "merged", "resident", "decoupled"]] = "auto"
    """how an adapter layer computes its output: see docs/method.md"""
    base: Free[Literal["int8", "fp8"] | None] = None
    """store weights under adapters in 8 bits on the device, with a scale per output feature; null: as the rest of the
    model; see docs/method.md"""
    base_products: Free[bool | Literal["auto"]] = "auto"
    """base int8, fp8: multiply in 8 bits too; false: only store them; auto: multiply if that is faster on this
    machine"""
    dropout: Decay = 0.0
    """dropout of an adapter's input, as in LoRA; layers then train in decoupled form; 0: none"""
    merge_every: Positive = Field(
        2000, description=f"steps between merges ({', '.join(m.name for m in METHODS.values() if m.merges)})"
    )
    merge_until_step: Positive | None = None
    """the last step that may merge; null: the last but one"""
    reset: Literal["full", "magnitude", "random", "none", "carry"] = "full"
    """what a merge does to the adapters' optimizer state: see docs/method.md; use carry together with
    optim.restart_warmup_steps=0"""
    reset_ratio: Fraction = 0.9
    """fraction of the state that magnitude and random set to zero"""

    @property
    def record(self) -> Method:
        """The method's record in the registry."""
        return METHODS[self.name]

    @property
    def eight_bits(self) -> str | None:
        """``int8`` or ``fp8`` if weights under adapters are stored in 8 bits, otherwise None."""
        return self.base if self.uses_adapters else None

    def of(self, projection: str) -> Self:
        """The settings for the layers of one projection, such as ``q_proj``."""
        return self.model_copy(update={"rank": self.rank_pattern.get(projection, self.rank)})

    @property
    def uses_adapters(self) -> bool:
        return self.record.adapter is not None

    @property
    def uses_squares(self) -> bool:
        return self.record.adapter is not None and self.record.adapter.has_square

    @property
    def trains_linears(self) -> bool:
        """Whether the decoder's linears without an adapter train."""
        if not self.uses_adapters:
            return True
        if self.train_linears is not None:
            return self.train_linears
        return self.train_embeddings is True or self.train_norms or self.train_head

    @property
    def trains_rows(self) -> bool:
        """Whether only some rows of embeddings and head train."""
        return not isinstance(self.train_embeddings, bool)

    @property
    def merges(self) -> bool:
        return self.record.merges

    @property
    def cycle(self) -> tuple[int, ...]:
        """The operators in the order of the merges: only the first one without merges, none without square matrices."""
        if not self.uses_squares:
            return ()
        return tuple(self.operators if self.merges else self.operators[:1])


class TrainConfig(Strict):
    run_dir: Free[HomePath]
    """folder of this run: config, metrics, TensorBoard, checkpoints"""
    steps: Positive = 10000
    """optimizer steps of the whole run; or set tokens or epochs instead"""
    tokens: Whole | None = None
    """tokens of the whole run, instead of steps, e.g. 5e9; rounded up to whole steps"""
    epochs: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """passes over the training text, instead of steps; its tokens are counted at the start"""
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 1024
    """sequences per optimizer step, over all ranks"""
    micro_batch_size: Free[Positive] = 16
    """sequences per forward pass on one rank"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 if it is fast on this hardware, else fp32"""
    zero_stage: Free[Annotated[int, Field(ge=0, le=3)]] = 2
    """DeepSpeed ZeRO stage"""
    deterministic: Free[bool] = False
    """on GPUs: compute the same bits every time, for bit-equal resumes; slower; CPUs always do"""
    seed: Seed = 0
    """seed of the initial weights and everything else random, except text order"""
    resume: Free[HomePath] = "auto"
    """auto: from the newest complete checkpoint of run_dir; never: refuse a run_dir with checkpoints; or a checkpoint
    folder"""
    allow_changes: Free[list[str]] = Field([])
    """settings that may differ from the checkpoint's, e.g. [optim.lr]"""
    max_bad_steps: Free[Positive] = 3
    """roll back after this many steps in a row with a non-finite loss or gradient"""
    max_rollbacks: Free[NotNegative] = 1
    """returns to the last good checkpoint, skipping the data since then, before the run stops"""
    peer_timeout_seconds: Free[Annotated[float, Field(ge=5, le=LONGEST_SECONDS, allow_inf_nan=False)]] = 300.0
    """end the run if a rank is gone or has done nothing for this long"""
    deepspeed: Free[DeepSpeed] = DeepSpeed()
    """additional DeepSpeed settings; those that follow from other settings are refused"""


class EvalConfig(Strict):
    every_steps: NotNegative = 1000
    """steps between evaluations; 0: only at the start and the end"""
    max_tokens: Positive | None = 10_000_000
    """predicted tokens to score in each held-out set; null: all"""
    micro_batch_size: Positive | None = None
    """sequences per forward pass on one rank; null: train.micro_batch_size"""
    at_start: bool = True
    """evaluate before the first step"""
    generate: NotNegative = 0
    """records per held-out set, within eval.max_tokens, whose answers are also generated; 0: none"""
    tasks: list[Text] = Field([])
    """tasks of lm-evaluation-harness or of docs/tasks.md, or YAML files of tasks, to score as well"""
    tasks_every_steps: NotNegative | None = None
    """steps between evaluations of eval.tasks; 0: only at the start and the end; null: every_steps"""
    task_data: Text | None = None
    """the rows of local tasks: a folder or a file of JSON lines"""
    num_fewshot: NotNegative | None = None
    """rows with their answers before each row of a task; null: what the task defines, else none"""
    limit: Positive | None = None
    """rows of each task to score; null: all"""


class CheckpointConfig(Strict):
    every_steps: NotNegative = 1000
    """steps between checkpoints; 0: only at the end"""
    keep_last: Positive = 2
    """newest checkpoints to keep"""
    keep_every_steps: NotNegative = 0
    """also keep every checkpoint whose step is a multiple of this; 0: none"""
    keep_best: Text | None = None
    """also save and keep the checkpoint with the best value of this metric, such as eval/loss or tasks/arc_easy/acc;
    null: none"""
    mirror: Text | None = None
    """a folder in a store, such as s3://BUCKET/RUN, that gets a copy of every complete checkpoint, and from which an
    empty run folder continues; null: none"""


class LogConfig(Strict):
    every_steps: Positive = 10
    """steps between lines of metrics.jsonl and TensorBoard"""
    tensorboard: bool = True
    """write TensorBoard events"""
    wandb: Project | None = None
    """a Weights & Biases project to log to as well, PROJECT or ENTITY/PROJECT; null: none; see docs/metrics.md"""
    progress: bool = True
    """show progress on the first rank: bars on a terminal, and a line with the loss now and then"""
    peak_tflops: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """peak of one device in TFLOP/s, for utilization; null: from a data sheet or a measurement"""


class Config(Strict):
    """One run. Later layers win: defaults, YAML file, ``--section.key=value``."""

    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def by_name(self) -> dict[str, Any]:
        """All settings by dotted name."""
        return {f"{section}.{key}": value for section, values in self for key, value in values}

    @property
    def tokens_per_step(self) -> int:
        """Tokens that the model sees per optimizer step, over all ranks."""
        return self.train.batch_size * self.data.sequence_length

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.train.micro_batch_size * self.data.sequence_length

    @property
    def tokenizer_path(self) -> str:
        """``tokenizer.path``, which the start of a run fills in. Raises ValueError if it is null."""
        if self.tokenizer.path is None:
            raise ValueError(
                "tokenizer.path: null means the tokenizer of model.init_from, which is not used here; "
                "set it to a tokenizer's folder or file"
            )
        return self.tokenizer.path

    @property
    def lanes(self) -> int:
        """``data.lanes``; by default the largest power of two <= 64 that divides the global batch."""
        return self.data.lanes or lanes_of(self.train.batch_size)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per optimizer step on one rank."""
        return self.train.batch_size // (self.train.micro_batch_size * world_size)


# the settings of all sections, by dotted name
SETTINGS: dict[str, FieldInfo] = {
    f"{section}.{key}": setting
    for section, field in Config.model_fields.items()
    for key, setting in getattr(field.annotation, "model_fields", {}).items()
}


def may_change(name: str) -> str | None:
    """``Resume.change`` of a setting; None if it has none."""
    metadata = SETTINGS[name].metadata if name in SETTINGS else []
    return next((item.change for item in metadata if isinstance(item, Resume)), None)


def lanes_of(batch_size: int) -> int:
    """The number of lanes that ``data.lanes: null`` means."""
    return min(64, batch_size & -batch_size)
