"""The commands `serve` and `encode`."""

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from flowgrain.cli.app import Plugins, Preset, Words, app, config_from, say, writing
from flowgrain.cli.progress import ProgressDisplay
from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from flowgrain.rewards import RewardConfig

HEADER_SECONDS = 10.0
"""Time in which the headers of a request must arrive."""
MAX_CONNECTIONS = 1000
"""Open connections. Further requests get status 503."""
_ENCODED_AT_ONCE = 64


@app.command()
def serve(
    rewards: Annotated[
        list[str],
        typer.Argument(
            metavar="REWARD ...",
            help="Names, or YAML mappings as in the list `rewards` of a configuration.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port.")] = 8600,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum images per request.")] = 256,
    max_megabytes: Annotated[
        int, typer.Option(min=1, help="Maximum MB per request, and of all waiting requests.")
    ] = 256,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Maximum requests that wait. Others get status 503.")
    ] = 16,
    body_seconds: Annotated[
        float, typer.Option(min=0.1, help="Time in which a request must arrive, in seconds.")
    ] = 60.0,
    plugins: Plugins = None,
) -> None:
    """Serve rewards over HTTP for training runs on other machines.

    If the environment variable FLOWGRAIN_TOKEN is set, every request needs this bearer token.

    Examples:
    * `flowgrain serve towers preference --port 8600`
    * `flowgrain serve towers "{name: clip, path: openai/clip-vit-large-patch14, device: cuda}"`
    * Client: `flowgrain train "rewards=[{name: remote, url: 'http://HOST:8600', reward: towers}]"`
    """
    from flowgrain.models.quiet import quiet_libraries

    quiet_libraries()
    from flowgrain.heap import return_freed_memory
    from flowgrain.registry import load_plugin
    from flowgrain.rewards import build_reward
    from flowgrain.rewards.identity import reward_identity
    from flowgrain.rewards.messages import TOKEN_VARIABLE
    from flowgrain.rewards.server import reward_app

    return_freed_memory()
    for path in plugins or ():
        load_plugin(path)
    configs = reward_configs(rewards)
    served = {name: build_reward(config) for name, config in configs.items()}
    identities = {name: reward_identity(config) for name, config in configs.items()}
    token = os.environ.get(TOKEN_VARIABLE)
    limits = (max_images, max_megabytes * 2**20, max_queue, body_seconds)
    application = reward_app(served, token, *limits, identities=identities)
    with listen(host, port) as listener:
        address, number = f"[{host}]" if ":" in host else host, listener.getsockname()[1]
        protected = "" if token else ", without a token"
        say(f"serving {', '.join(served)} on http://{address}:{number}{protected}")
        _run(application, listener)


def _run(application: "FastAPI", listener: socket.socket) -> None:
    """Run the server until SIGINT or SIGTERM."""
    import uvicorn

    from flowgrain.slow_clients import guarded_protocol

    options = uvicorn.Config(
        application,
        http=guarded_protocol(HEADER_SECONDS),
        ws="none",
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(options).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`:`port`.

    Raises:
        SettingsError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            f"--host {host} --port {port}: the server cannot listen there ({error}). "
            "Use another port, or an address of this machine."
        ) from error


def reward_configs(words: list[str]) -> "dict[str, RewardConfig]":
    """The rewards of the words of a command: names, or YAML mappings with options.

    Raises:
        SettingsError: a word is not a reward.
    """
    from flowgrain.config.load import parse_overrides
    from flowgrain.rewards import RewardConfig

    configs: dict[str, RewardConfig] = {}
    for word in words:
        values = parse_overrides([f"rewards=[{word}]"])["rewards"]
        if len(values) != 1:
            raise SettingsError(
                f"{word!r}: not one reward. Separate rewards by spaces: "
                "flowgrain serve towers preference."
            )
        try:
            config = RewardConfig.model_validate(values[0])
        except ValidationError as error:
            detail = error.errors()[0]
            place = ".".join(map(str, detail["loc"]))
            reason = detail["msg"].removeprefix("Value error, ")
            raise SettingsError(f"{word}: {place}: {reason}.") from error
        if config.name in configs:
            raise SettingsError(f"{config.name} is listed twice. List every reward once.")
        configs[config.name] = config
    return configs


@app.command()
def encode(words: Words = None, plugins: Plugins = None, preset: Preset = None) -> None:
    """Write the embeddings of all prompts to model.embedding_cache.

    Training then loads no text encoder.

    Example:
    * `flowgrain encode flux/g2rpo data.prompts=train.txt data.eval_prompts=test.txt`
    """
    from flowgrain.models.quiet import quiet_libraries

    quiet_libraries()
    from flowgrain.training.load import compute_device, load_model, load_prompts

    config = config_from(words, plugins, preset)
    folder = config.model.embedding_cache
    if folder is None or config.model.name == "shapes":
        raise SettingsError(
            f"model.embedding_cache={folder}, model.name={config.model.name}: encode needs a "
            "directory to write to, and a model with text encoders."
        )
    backbone = load_model(config, train=False)
    backbone.to(compute_device(config.runtime.device))
    prompts = [*load_prompts(config, backbone, "train"), *load_prompts(config, backbone, "eval")]
    texts = list(dict.fromkeys(["", *(prompt.text for prompt in prompts)]))
    with ProgressDisplay("prompt", total=len(texts)) as display:
        for first in range(0, len(texts), _ENCODED_AT_ONCE):
            with writing(f"model.embedding_cache={folder}", Path(folder).expanduser()):
                backbone.encode(texts[first : first + _ENCODED_AT_ONCE])
            display.show(min(first + _ENCODED_AT_ONCE, len(texts)))
    say(f"The embeddings of {len(texts)} prompts are in {Path(folder)}.")
