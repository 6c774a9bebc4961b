"""The page of `svdit app`, with Gradio. It is served to browsers on this machine only, and needs no network."""

import html
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from svdit.cli.side_by_side import IMAGES, Comparison, classes, compare
from svdit.errors import UserError, sentence
from svdit.extras import require
from svdit.quant.config import RECIPES

ADDRESS = "127.0.0.1"
TEXT = f"""\
# svdit
{IMAGES} images of a class from the same noise, in full precision and quantized: a DiT by DDIM, a flow by Heun's method.
A preset is calibrated when it is first used."""


class Server(NamedTuple):
    """A page that is being served by threads."""

    url: str

    def wait(self) -> NoReturn:
        """Wait for Ctrl-C or a signal, then exit at once: threads that still compute would abort Python's own exit."""
        code = 128 + signal.SIGINT
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        except SystemExit as end:
            code = int(end.code or 0)
        os._exit(code)


def serve(models: Mapping[str, Path], device: torch.device, port: int) -> Server:
    """Serve the page in a thread. Raises UserError where Gradio is missing, and for a port in use."""
    gr = require("gradio")
    demo = page(gr, models, device)
    try:
        demo.launch(
            server_name=ADDRESS,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            css="th, td { overflow-wrap: normal !important; word-break: normal !important; padding: 8px !important }",
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )
    except OSError:
        raise UserError(f"port {port} is in use; pass another --port") from None
    return Server(f"http://{ADDRESS}:{port}")


def page(gr: Any, models: Mapping[str, Path], device: torch.device) -> Any:
    """The page, for `models` by name."""

    def options(name: str) -> Any:
        names = classes(models[name], device)
        return gr.Dropdown([(text, number) for number, text in enumerate(names)], value=0, label="class")

    def draw(
        name: str,
        preset: str,
        label: int,
        seed: int | None,
        steps: int,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        progress(0, "preparing the models")
        try:
            result = compare(
                models[name],
                preset,
                label,
                seed or 0,
                steps,
                device,
                lambda done, x: progress((done, 2 * steps), "sampling"),
            )
        except Exception as error:
            if (message := sentence(error)) is None:
                raise
            raise gr.Error(html.escape(message), print_exception=False) from None
        return result.original.pixels, result.quantized.pixels, table_of(result)

    first = next(iter(models))
    with gr.Blocks(title="svdit", analytics_enabled=False) as demo:
        gr.Markdown(TEXT)
        with gr.Row():
            model = gr.Dropdown(list(models), value=first, label="model")
            preset = gr.Dropdown(list(RECIPES), value="w8a8", label="preset")
            label = options(first)
            seed = gr.Number(0, label="seed", precision=0)
            steps = gr.Slider(2, 250, value=50, step=1, label="sampling steps")
        button = gr.Button("Sample", variant="primary")
        with gr.Row():
            images = [
                gr.Image(label=text, alt_text=text, format="png", interactive=False, buttons=["download"])
                for text in ("full precision", "quantized")
            ]
        table = gr.Markdown()
        model.change(options, model, label, api_visibility="private")
        button.click(draw, [model, preset, label, seed, steps], [*images, table], api_visibility="private")
    return demo


def table_of(result: Comparison) -> str:
    """What was measured, as Markdown."""
    first, second, psnr = result
    return f"""\
| | full precision | quantized |
|---|---|---|
| time | {first.seconds:.2f} s | {second.seconds:.2f} s |
| weights in memory | {first.nbytes / 1e6:.2f} MB | {second.nbytes / 1e6:.2f} MB |
| PSNR to full precision | – | {psnr:.1f} dB |
"""
