"""Every setting of a run, with its unit, as frozen pydantic models (no torch).

The docstring below a field is its description in `disttrain schema`. A setting that does not apply to the run
(a loss scale without fp16, say) is refused by `disttrain.config.problems`, never ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from disttrain.config.cleaning import CleaningConfig
from disttrain.config.gradients import HorovodConfig, OuterConfig
from disttrain.config.optimizer import OptimConfig
from disttrain.config.profile import ProfileConfig
from disttrain.config.section import Fraction, NonNegative, Positive, Section, Size
from disttrain.config.smaller import PruningConfig, QuantizationConfig
from disttrain.config.task import DistillConfig, EncoderConfig, HeadConfig, TaskConfig
from disttrain.config.watching import WatchConfig

Family = Literal["gpt", "bert", "text_cnn", "rnn"]
Corpus = Literal["python-docs", "text", "hf", "tokens"]
Precision = Literal["fp32", "bf16", "fp16", "fp64"]
PipelineSchedule = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"
]

CandidateCodec = Literal[
    "none", "fp16", "bf16", "int8", "int4", "qsgd", "topk", "randomk", "threshold", "sign", "powersgd"
]
"""What `compression.codec=auto` can choose."""
GradientCodec = Literal[
    "none", "auto", "fp16", "bf16", "int8", "int4", "qsgd", "topk", "randomk", "threshold", "sign", "powersgd",
    "onebit_adam", "onebit_lamb",
]  # fmt: skip
ONE_BIT: dict[GradientCodec, str] = {"onebit_adam": "adamw", "onebit_lamb": "lamb"}
"""Codecs that are half an optimizer, and the optim.name that is the other half."""

WandbName = Annotated[str, Field(pattern=r"^[^/\\#?%:\r\n]+$", max_length=128)]


class RunConfig(Section):
    """Where the run lives and what it runs on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run folder; the config file's stem when not given."""
    dir: str = "runs"
    """Folder that holds the run folders."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1234
    """Seed of the initial weights, the order of the data and dropout."""
    deterministic: bool = False
    """Use torch's deterministic algorithms only (slower on a GPU)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type; auto takes CUDA where there is a GPU."""
    compile: bool = False
    """Compile every block with torch.compile: the first steps take long, the others less."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds that a rank waits for the others in a collective before it fails (docs/faults.md)."""


class ModelConfig(HeadConfig, EncoderConfig):
    """Shape of the model. A preset fills what is not given."""

    family: Family = "gpt"
    """gpt: pre-LN decoder, causal language model. bert: post-LN encoder, masked language model and next sentence. text_cnn,
    rnn: small encoders for tasks (docs/tasks.md)."""
    source: str | None = None
    """A model of your own: path/to/file.py:Class, where Class extends disttrain.models.GPT or BERT (docs/verify.md)."""
    options: dict[str, bool | int | float | str] = {}
    """Settings of your own model; it reads them as config.options."""
    preset: str | None = None
    """Named shape, for example gpt2-124m or bert-base (`disttrain.config.presets`)."""
    layers: Annotated[int, Field(gt=0, le=10_000)] = 4
    """Number of transformer blocks."""
    hidden_size: Size = 128
    """Width of the residual stream."""
    heads: Size = 4
    """Attention heads; must divide hidden_size where head_size is not given."""
    head_size: Size | None = None
    """Width of one head; hidden_size / heads when not given. A model whose heads were pruned has fewer of the same width."""
    ffn_hidden_size: Positive | None = None
    """Width of the feed-forward layer; 4 x hidden_size when not given."""
    max_positions: Positive = 256
    """Learned positions, tokens."""
    vocab_size: Positive | None = None
    """Rows of the embedding; the tokenizer's size when not given, and never smaller."""
    dropout: Fraction = 0.0
    """Dropout probability of embeddings, attention and residual branches."""
    layer_norm_epsilon: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of layer normalisation; 1e-5 for gpt and 1e-12 for bert when not given."""


class BlendSource(Section):
    """One source of a blend."""

    corpus: Corpus
    """Kind of the source."""
    path: str | list[str] | None = None
    """Files, folders or globs (text), dataset name (hf), or prepared folder (tokens)."""
    weight: Annotated[float, Field(gt=0)]
    """Relative share of the training sequences."""


class DataConfig(Section):
    """Corpus, tokenizer and how sequences are made."""

    corpus: Corpus | None = None
    """python-docs: text every Python carries. text: files. hf: the hub. tokens: prepared shards. Or use blend."""
    path: str | list[str] | None = None
    """Files, folders or globs (text), dataset name (hf), or prepared folder (tokens)."""
    blend: list[BlendSource] | None = None
    """Several sources by weight, in place of corpus and path."""
    held_out_path: str | list[str] | None = None
    """Own held-out files, folders or globs (text); otherwise held_out_fraction of the corpus is kept apart."""
    held_out_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the corpus, by bytes, that is never trained on."""
    document: Literal["file", "line", "blank_line", "jsonl"] = "file"
    """What separates documents in text files (jsonl: one JSON object a line)."""
    text_field: str = "text"
    """Key of the text in jsonl and hf records."""
    hf_config: str | None = None
    """Configuration name of the hf dataset."""
    hf_split: str = "train"
    """Split of the hf dataset."""
    max_bytes: Positive | None = None
    """Read at most about this many bytes of text from each source."""
    tokenizer: str = "bytes"
    """bytes, bpe or wordpiece (trained on the corpus), gpt2 or bert (tokenizer_path), or a Hugging Face name. words: those
    of a task's training examples."""
    tokenizer_path: str | None = None
    """Folder with GPT-2's or BERT's vocabulary files, or a tokenizer.json."""
    tokenizer_vocab_size: Annotated[int, Field(ge=260)] = 8192
    """Entries of a trained bpe or wordpiece vocabulary."""
    lowercase: bool = False
    """Lower-case the text before training and using a wordpiece vocabulary, or BERT's uncased one."""
    sequence_length: Annotated[int, Field(ge=8)] = 128
    """Tokens of a training sequence."""
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that BERT predicts (80 % masked, 10 % random, 10 % kept)."""
    short_sequence_probability: Fraction = 0.1
    """Share of BERT's sequences that are made shorter than sequence_length."""
    cache_dir: str = "~/.cache/disttrain"
    """Prepared tokens and trained tokenizers, shared by runs."""
    workers: Positive | None = None
    """Processes that prepare data; the number of cores when not given."""


class TrainConfig(Section):
    """How long, how much at once, and when to look."""

    steps: Positive | None = None
    """Stop after this many optimizer steps."""
    tokens: Positive | None = None
    """Stop after the step that brings the run to this many tokens, padding included."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Stop after every training example of a task was seen so many times; a step's part beyond that is of the next epoch."""
    patience: Positive | None = None
    """Stop when so many evaluations in a row have not lowered the held-out loss."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Stop after this many seconds inside training steps, those before a resume included."""
    target_loss: Annotated[float, Field(gt=0)] | None = None
    """Stop when the held-out loss is at or below this many nats per target token."""
    global_batch_size: Positive = 32
    """Sequences of one optimizer step, over all ranks."""
    micro_batch_size: Size | None = None
    """Sequences of one forward pass on one data rank; the rest is gradient accumulation. All at once by default."""
    eval_every: NonNegative = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_sequences: Positive | None = 512
    """Held-out sequences of an evaluation; null takes all."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null does not clip."""
    label_smoothing: Fraction = 0.0
    """Share of the target probability spread over the vocabulary in training (never in evaluation)."""
    l1_penalty: Annotated[float, Field(ge=0)] = 0.0
    """What the sum of absolute weights of matrices and embeddings costs; its gradient is clipped with the loss's."""
    l2_penalty: Annotated[float, Field(ge=0)] = 0.0
    """What half the sum of their squares costs: decay that is coupled to the gradient, where optim.weight_decay is not."""


class LossScaleConfig(Section):
    """Dynamic loss scaling of fp16 (Micikevicius et al. 2017)."""

    initial: Annotated[float, Field(gt=0)] = 65536.0
    """First loss scale."""
    growth_interval: Positive = 2000
    """Good steps before the scale doubles."""
    minimum: Annotated[float, Field(gt=0)] = 1.0
    """The scale is never halved below this; a step that overflows at it stops the run."""


class ParallelConfig(Section):
    """Sizes of the mesh; what is left of the world is data-parallel."""

    tensor: Size = 1
    """Ranks that share every matrix: heads, feed-forward features and vocabulary (Shoeybi et al. 2019)."""
    sequence: bool = False
    """Split what lies between the matrices by positions over the tensor ranks (Korthikanti et al. 2022)."""
    pipeline: Size = 1
    """Ranks that share the layers; each holds one stage, or virtual_stages of them."""
    schedule: PipelineSchedule = "1f1b"
    """Order of the micro-batches in the pipeline (`disttrain.stages` names the papers)."""
    virtual_stages: Size | None = None
    """Stages that a rank holds: 2 when not given, for interleaved_1f1b, looped_bfs and interleaved_zero_bubble. Always
    2 for zbv and dualpipev, always 1 for gpipe and 1f1b."""
    context: Size = 1
    """Ranks that share every sequence; a GPT's is cut into 2 x context chunks, which balances causal attention."""
    context_method: Literal["ring", "ulysses"] = "ring"
    """How attention looks across the ranks that share a sequence: keys and values go round (ring, Liu et al. 2023), or
    positions are exchanged for heads (ulysses, Jacobs et al. 2023)."""
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage: 0 replicates, 1 shards the optimizer, 2 gradients too, 3 parameters too; over data x context ranks."""
    replicate: Size = 1
    """Replicas of the sharded group (HSDP)."""
    offload: bool = False
    """Keep what ZeRO shards in host memory and update it there."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those inside attention, or whole blocks."""


class CompressionConfig(Section):
    """Gradient compression: what travels when gradients are summed over the data ranks (docs/compression.md)."""

    codec: GradientCodec = "none"
    """How gradients are coded on the wire (`disttrain.grad_compression.codecs` names the papers). auto measures the link and
    rehearses the candidates when a run starts or goes on, and says what it takes and why."""
    candidates: Annotated[list[CandidateCodec], Field(min_length=1)] = ["bf16", "int8", "int4", "powersgd"]
    """What auto compares beside none, the best liked first: of those that are as fast as the fastest it takes the first."""
    look_every: NonNegative = 100
    """Steps between looks at the link by auto, which chooses anew when it is twice as fast or half as fast; 0: no looks."""
    error_feedback: bool | None = None
    """Add what a code has lost to the next step's gradient. When not given: off for fp16, bf16, int8 and qsgd, which lose
    rounding errors only, on for the others."""
    ratio: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    """Share of the elements that topk and randomk send."""
    threshold: Annotated[float, Field(ge=1)] = 3.0
    """threshold sends elements of at least so many times the root mean square of their parameter's gradient."""
    bits: Literal[2, 4, 8] = 4
    """Bits an element of qsgd."""
    rank: Positive = 4
    """Columns of powersgd's factors."""
    warm_start: bool = True
    """powersgd goes on from the last step's factor instead of a random one."""
    warmup_steps: NonNegative = 0
    """First steps (skipped ones count) with whole gradients. onebit_adam and onebit_lamb learn second moments in them, which
    then stay."""
    min_elements: Positive = 4096
    """Parameters with fewer elements travel whole; vectors always do."""
    embeddings: bool = True
    """Code embeddings and the output layer as well."""

    @property
    def feeds_back(self) -> bool:
        """Whether errors are fed back, where the setting leaves it open."""
        if self.error_feedback is None:
            return self.codec not in ("none", "fp16", "bf16", "int8", "qsgd")
        return self.error_feedback


class CheckpointConfig(Section):
    """When to save, what to keep, where to start."""

    every: NonNegative = 0
    """Steps between checkpoints; 0 saves at the end and on interruption only."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, which takes as much of the host's memory once more as the state has; the one
    at the end is waited for."""
    keep: Positive = 3
    """Newest checkpoints that are kept."""
    keep_every: NonNegative = 0
    """Checkpoints of steps that are multiples of this are never removed; 0 for none."""
    keep_best: NonNegative = 0
    """Checkpoints that are kept beside the newest because their held-out loss is the lowest."""
    resume: str = "auto"
    """auto: the newest good checkpoint of the run folder. never: start a new run. Or a checkpoint's path."""
    weights: str | None = None
    """Begin a new run with the weights of this run, checkpoint or imported model; the optimizer begins anew, at step 0."""


class LogConfig(Section):
    """Sinks beside metrics.jsonl, which is always written."""

    every: Positive = 1
    """Steps between step records."""
    console: Literal["auto", "live", "plain", "none"] = "auto"
    """Progress display; auto is live on a terminal and plain elsewhere."""
    tensorboard: bool = False
    """Write TensorBoard events to the run folder."""
    wandb: bool = False
    """Log to Weights & Biases from one rank (docs/wandb.md)."""
    wandb_project: WandbName | None = None
    """Weights & Biases project; WANDB_PROJECT, else disttrain, when not given."""
    wandb_entity: WandbName | None = None
    """User or team that owns the project; WANDB_ENTITY, else your default one, when not given."""
    wandb_group: WandbName | None = None
    """Runs that belong together; WANDB_RUN_GROUP when not given, and the tasks of a Slurm array are one group."""
    wandb_tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []
    """Words to find the run by; WANDB_TAGS when empty."""
    wandb_notes: str | None = None
    """A remark about the run; WANDB_NOTES when not given."""
    wandb_mode: Literal["online", "offline"] | None = None
    """Overrides WANDB_MODE; offline keeps everything in the run folder for `wandb sync`."""


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    cleaning: CleaningConfig = CleaningConfig()
    distill: DistillConfig = DistillConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Arithmetic of forward and backward; weights and optimizer stay fp32 (fp64 for proofs).
    auto: bf16 where the device multiplies bf16 natively, else fp32."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    engine: Literal["native", "deepspeed", "horovod"] = "native"
    """What executes one optimizer step."""
    parallel: ParallelConfig = ParallelConfig()
    compression: CompressionConfig = CompressionConfig()
    outer: OuterConfig = OuterConfig()
    pruning: PruningConfig = PruningConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own settings, added to those that follow from this config (docs/engines.md); a contradiction between
    the two is refused."""
    horovod: HorovodConfig = HorovodConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    profile: ProfileConfig = ProfileConfig()
    log: LogConfig = LogConfig()
