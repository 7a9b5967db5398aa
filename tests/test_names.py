"""The library has the field's words: what was replaced does not come back."""

import re
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "jvp_flash_attention"
# word -> where it means something else
REPLACED = {
    r"recall(ed)?|Bare|remember(ed)?|recorder|Plans?|plans|prepared": (),
    r"Rings?|KS|VS|QS|BS|PORTABLE|SIX|EARLY|BM|BN": ("distributed",),
    r"(await|give)_turn|send|receive": ("distributed",),
    r"keys_kernel|queries_kernel|row_sums_kernel": (),
    r"vendor|serves|obstacle": (),
    r"visible|BIAS|bias_grad|load_bias": (),
    r"Options": (),
}


def test_words_that_were_replaced_are_gone():
    for words, elsewhere in REPLACED.items():
        pattern = re.compile(rf"\b({words})\b")
        for path in sorted(LIBRARY.rglob("*.py")):
            if not any(part in path.parts for part in elsewhere):
                found = [line for line in path.read_text().splitlines() if pattern.search(line)]
                assert not found, (path.name, found[:3])


def test_no_file_of_the_library_is_longer_than_500_lines():
    for path in LIBRARY.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path
