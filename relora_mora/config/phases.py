"""The phases of a run: with ``method.full_steps``, the first steps train the decoder's linears at full rank."""

from dataclasses import dataclass

from relora_mora.config.schema import Config


@dataclass(frozen=True)
class Phase:
    """``config`` says what trains in this phase, and ``end`` is its last step."""

    config: Config
    end: int


def phases_of(config: Config) -> list[Phase]:
    """The phases of a run in their order; only one unless ``method.full_steps`` asks for two."""
    method = config.method
    own = Phase(config, config.train.steps)
    if not method.full_steps or not method.uses_adapters:
        return [own]
    optim = config.optim
    full_rank = {
        "method": method.model_copy(update={"name": "full"}),
        "optim": optim.model_copy(
            update={
                "lr": optim.lr if optim.lr_full is None else optim.lr_full,
                "lr_other": optim.lr if optim.lr_other is None else optim.lr_other,
            }
        ),
    }
    return [Phase(config.model_copy(update=full_rank), method.full_steps), own]
