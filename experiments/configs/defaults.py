"""Every field of a training config, its default, and what it means. The other configs start from it."""

from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    """A fresh copy of the defaults."""
    config = ConfigDict()
    config.run_dir = ""  # empty: --run, or runs/<name of the config>
    config.seed = 0  # of params and of the order of the data
    config.steps = 1000  # optimizer steps of the whole run; the schedule ends with them
    config.batch_size = 8  # rows a step, over all devices and processes
    config.accumulate = 1  # the batch goes through in this many parts, to save memory
    config.ema_decay = 0.0  # moving average of params in float32, used for evaluation; 0: none
    config.skip_nonfinite = (
        0  # so many steps in a row may be skipped as not finite; 0: the first ends the run
    )
    config.log_every = 1  # steps between lines of metrics.jsonl; 0: no lines
    config.tensorboard = True  # also write event files
    config.parallel = "jit"  # "jit" over a mesh, or "pmap"

    config.mesh = ConfigDict()  # devices by what they share; one size may be -1: all that are left
    config.mesh.slice = 1  # groups with slow links between them, such as slices of a TPU: rows of a batch
    config.mesh.data = -1  # rows of a batch
    config.mesh.fsdp = 1  # rows of a batch, and what `zero` says
    config.mesh.expert = 1  # rows of a batch, and the experts of MoE layers with expert_axis="expert"
    config.mesh.sequence = 1  # the tokens of a row, for rows of many; see docs/how-to/parallel.md
    config.mesh.pipeline = 1  # stages of layers; the parts that `accumulate` makes go through one by one
    config.mesh.tensor = 1  # each matrix
    config.mesh.tensor_messages = "sums"  # or "rings", in pieces beside products: see docs/how-to/parallel.md
    config.mesh.zero = 3  # over fsdp: 1 the optimizer's state, 2 gradients too, 3 params too; 0 nothing

    config.pipeline = ConfigDict()
    config.pipeline.chunks = 1  # parts of the depth on each stage, by turns: less idle time, more messages

    config.distributed = ConfigDict()  # several processes; on TPU pods and Slurm `enabled` is enough
    config.distributed.enabled = False
    config.distributed.coordinator = ""  # host:port of process 0
    config.distributed.processes = 0  # how many
    config.distributed.process = -1  # which one this is
    config.distributed.timeout = 300  # seconds within which all have to come

    config.data = ConfigDict()
    config.data.path = ""  # folder, glob or file of text; empty: this interpreter's standard library
    config.data.tokenizer = ""  # a Hugging Face tokenizer.json; empty: bytes
    config.data.sequence_length = 512  # tokens a row
    config.data.held_out = 0.05  # share of the files kept for evaluation; 0: train on all, evaluate on none

    config.model = ConfigDict()
    config.model.vocab_size = 0  # 0: the tokenizer's
    config.model.width = 256
    config.model.repeats = 4  # how often the pattern comes; its params are stacked and scanned over
    config.model.pattern = ()  # names of blocks, from the input up
    config.model.blocks = ConfigDict()  # blocks.NAME: see `block`
    config.model.tie_embeddings = True  # the output projection is the embedding
    config.model.ternary_head = False  # a BitLinear of its own instead, which tie_embeddings excludes
    config.model.remat = False  # recompute each layer in the backward pass: memory.remat="full"
    config.model.unroll = False  # write the repeats out: slower to compile, faster to run on CPU
    config.model.dtype = "float32"  # of activations and matmuls
    config.model.param_dtype = "float32"  # below a narrower dtype, these are its master weights
    config.model.backend = ""  # of frugax.kernels; empty: by the platform
    config.model.low_bit = ""  # a recipe of frugax.quant.training, such as "nvfp4", for dense layers

    config.memory = ConfigDict()  # of activations: all change memory and time, and no number
    config.memory.remat = ""  # "none", "full" or another of frugax.memory.POLICIES; empty: by model.remat
    config.memory.offload = False  # what is kept for the backward pass waits in the host's memory
    config.memory.loss_tiles = 1  # head and loss see this many parts of time, one by one, in training
    config.memory.mlp_tiles = 1  # and so do the channel mixers GLU and MLP

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "muon", or another of frugax.optim, optax, optax.contrib
    config.optimizer.learning_rate = 3e-3  # the peak
    config.optimizer.warmup_steps = 100  # linear, from 0
    config.optimizer.final_fraction = 0.0  # of the peak, where the cosine ends
    config.optimizer.weight_decay = 0.1  # not on norms, biases, gains, embeddings, A_log, D and dt_bias
    config.optimizer.decay = ""  # a regular expression for the paths of what decays instead: "mixer/.*kernel"
    config.optimizer.clip_norm = 1.0  # of the gradient; 0: no clipping
    config.optimizer.rounding = "nearest"  # or "stochastic", so that bfloat16 params keep small updates
    # What else the optimizer takes, by its own names. `moments` of an 8-bit one is a dict, such as
    # dict(group_size=2048, min_size=4096, full_precision="embedding$"), the last a regular expression.
    config.optimizer.options = ConfigDict()

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 200  # steps; the last step is always saved; 0: it alone
    config.checkpoint.keep = 2  # how many of the newest stay, beside the best of those evaluated

    config.evaluation = ConfigDict()
    config.evaluation.enabled = True  # False: never
    config.evaluation.every = 0  # steps, with a checkpoint, of which the best is kept; 0: at the end alone
    config.evaluation.batch_size = 8
    config.evaluation.sequence_length = 2048  # tokens of context at most
    config.evaluation.max_bytes = 0  # of the held-out files; 0: all

    config.sample = ConfigDict()
    config.sample.prompt = "def "
    config.sample.tokens = 400  # 0: no sample
    config.sample.temperature = 0.8  # 0: the likeliest token each time
    return config


def block(**fields) -> ConfigDict:
    """A block for config.model.blocks.NAME: the fields of `frugax.layers.Block`."""
    return ConfigDict({"mixer_args": {}, "channel_args": {}} | fields)


def check_variant(variant: str) -> None:
    """Raise ValueError unless `variant`, what follows the colon of --config, is empty or "smoke"."""
    if variant not in ("", "smoke"):
        raise ValueError(f"config variant: got {variant!r}; expected nothing or 'smoke'")


def shrink(config: ConfigDict) -> None:
    """Turn a config into one that shows in seconds that every part of it works."""
    config.steps = 12
    config.batch_size = 2 * config.accumulate
    config.data.sequence_length = 64
    config.model.vocab_size = 0
    config.model.width = 48
    config.model.repeats = 1
    config.optimizer.warmup_steps = 2
    config.checkpoint.every = 5
    config.evaluation.batch_size = 2
    config.evaluation.sequence_length = 128
    config.evaluation.max_bytes = 4096
    config.sample.tokens = 40
    sizes = [name for name in config.mesh if name not in ("zero", "tensor_messages")]
    config.mesh.update(dict.fromkeys(sizes, 1) | {"data": -1})
