"""The code has the field's words: what was replaced does not come back."""

import io
import re
import tokenize
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "jvp_flash_attention"
# word -> where it means something else
REPLACED = {
    r"recall(ed)?|Bare|remember(ed)?|recorder|Plans?|plans|prepared": (),
    r"Rings?|KS|VS|QS|BS|PORTABLE|SIX|EARLY|BM|BN": ("distributed",),
    r"(await|give)_turn|send|receive": ("distributed",),
    r"keys_kernel|queries_kernel|row_sums_kernel": (),
    r"vendor|serves|obstacle": (),
    r"visible|BIAS|bias_grad|load_bias": (),
    r"Options|hopper_\w+": (),
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


# Around the library: modules, identifiers in Python, keys of configurations.
MODULES = (
    "ranks settings trained judge together recompute duals stream buckets guard finish accuracy"
)
MODULES += " earlier_table roof"
WORDS = (
    "equal_share finest ckpt_changes attach judge judge_of Judge remark Stream Fresh Data Tensors"
)
WORDS += " held_out held_out_split TimeBuckets Guard Finish Accuracy earlier_table roof Roof"
WORDS += " train_together buckets"
KEYS = "equal_share finest floor ckpt_changes held_out held_out_split guard buckets accuracy"
ALLOWED = {  # files or folders -> words that mean something else there
    "training/trained.py": "trained",  # imports from the former module, for one release
    "training/renamed.py": "attach",  # the table of former names
    "training/objectives": "equal_share finest",  # arguments under former names: keywords(...)
    "tests/training/test_renamed.py": "equal_share finest",
    "training/data/packed.py": "held_out",  # a field of a file on disk
    "scripts/pack_pictures.py": "held_out",
    "scripts/openclipart.py": "held_out",  # a key of result files
    "tests/training/test_data.py": "held_out",
    "training/models": "Stream",  # the residual stream
    "scripts/benchmark_attention.py": "Stream",  # torch.cuda's
    "tests/test_benchmark.py": "Stream",
    "tests/test_gpu.py": "Stream",
    "scripts/benchmarks/accuracy.py": "accuracy",  # how exact attention is
}


def forbidden(path: Path, words: str) -> set[str]:
    name = path.relative_to(ROOT).as_posix()
    inside = [allowed for place, allowed in ALLOWED.items() if f"{name}/".startswith(f"{place}/")]
    return set(words.split()) - set(" ".join(inside).split())


def test_around_the_library_too():
    for folder in ("training", "scripts", "tests", "examples", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            assert path.stem not in forbidden(path, MODULES), path
            tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
            names = {token.string for token in tokens if token.type == tokenize.NAME}
            assert not names & forbidden(path, WORDS), (path, names & forbidden(path, WORDS))
        for path in sorted((ROOT / folder).rglob("*.yaml")):
            found = set(keys(yaml.safe_load(path.read_text()))) & set(KEYS.split())
            assert not found, (path, found)


def keys(node):
    for key, value in node.items() if isinstance(node, dict) else ():
        yield key
        yield from keys(value)


def test_documents_name_no_former_key_but_to_say_so():
    former = re.compile(
        r"\b(equal_share|finest|ckpt_changes|held_out|optimizer\.floor|--suite readme)\b"
    )
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text().split("## Former names")[0]
        found = [line for line in text.splitlines() if former.search(line)]
        assert not found, (path.name, found[:3])
