"""Golden texts: what the tokenizers of open_clip and HPSv2 make of a prompt."""

from collections.abc import Iterator

from golden.comparison import comparison, golden

from flowgrain.rewards import text

OPEN_CLIP = "mlfoundations/open_clip 89fb801"
HPS = "tgxs002/HPSv2 866735e, SimpleTokenizer.encode"

Cases = Iterator[tuple[str, str, str]]


def cases(function: str, key: str) -> Cases:
    for number, case in enumerate(golden("text_cleaning")["cases"]):
        yield f"{number}: {case['text']!r}", getattr(text, function)(case["text"]), case[key]


@comparison(
    "Prompt cleaning: characters and entities", "text_cleaning", f"{OPEN_CLIP}, basic_clean"
)
def basic() -> Cases:
    yield from cases("basic", "basic")


@comparison("Prompt cleaning: white space", "text_cleaning", f"{OPEN_CLIP}, whitespace_clean")
def whitespace() -> Cases:
    yield from cases("whitespace", "whitespace")


@comparison("Prompts of `clip`", "text_cleaning", f'{OPEN_CLIP}, get_clean_fn("lower")')
def lower() -> Cases:
    yield from cases("lower", "lower")


@comparison("Prompts of `hps`", "text_cleaning", HPS)
def hps_lower() -> Cases:
    yield from cases("lower", "hps_lower")
