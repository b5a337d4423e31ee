"""`disttrain demo`: train, then show beside a trigram what the model learned, and let it write."""

from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from disttrain import report
from disttrain.data import Tokenizer
from disttrain.tasks.baseline import trigram_loss, uniform_loss
from disttrain.tasks.generate import generate
from disttrain.tasks.trained import Trained, load_trained

PROMPTS = ("def ", "Return the ", "import ")


def show_what_was_learned(folder: Path, console: Console) -> bool:
    """Print samples and the held-out loss beside the baselines, redraw the curve with them; whether the model won."""
    trained = load_trained(folder)
    run = report.read_run(folder)
    ours = next(record["eval_loss"] for record in reversed(run.evals) if record["step"] == trained.step)
    with console.status("fitting a Kneser-Ney trigram to the same training text"):
        trigram = trigram_loss(trained.config, trained.prepared)
    lines = {"Kneser-Ney trigram": trigram, "uniform": uniform_loss(trained.config, trained.prepared)}
    report.loss_curve(run, folder / "loss_curve.png", {"Kneser-Ney trigram": trigram})
    console.print(_samples(trained))
    console.print(_comparison(ours, lines))
    won = ours < trigram
    verdict, style = ("beats", "bold green") if won else ("does not beat", "bold red")
    console.print(f"The trained model {verdict} the trigram on the same held-out tokens.", style=style)
    console.print(f"Loss curve: {folder / 'loss_curve.png'}", highlight=False)
    return won


def _samples(trained: Trained) -> Group:
    """What the model writes after each prompt, each in a box."""
    boxes = []
    tokenizer = trained.tokenizer
    assert isinstance(tokenizer, Tokenizer)  # a language model's
    for prompt in PROMPTS:
        new = generate(
            trained.model,  # type: ignore[arg-type]
            tokenizer.encode(prompt).tolist(),
            max_new_tokens=200,
            temperature=0.6,
            top_k=40,
            seed=1,
            stop_id=tokenizer.end_of_text,
            vocab_size=tokenizer.vocab_size,
        )
        text = Text.assemble((prompt, "bold cyan"), tokenizer.decode(new).rstrip())
        boxes.append(Panel(text, box=box.ROUNDED))
    return Group(Text("What it writes after a few letters", style="bold"), *boxes)


def _comparison(ours: float, lines: dict[str, float]) -> Table:
    table = Table(title="Held-out loss, same tokens", title_justify="left", title_style="bold")
    table.add_column("model")
    table.add_column("nats per token", justify="right")
    table.add_column("bits per token", justify="right")
    nats_per_bit = 0.6931471805599453
    for name, loss in sorted({"this model": ours, **lines}.items(), key=lambda item: item[1]):
        style = "bold" if name == "this model" else None
        table.add_row(name, f"{loss:.4f}", f"{loss / nats_per_bit:.4f}", style=style)
    return table
