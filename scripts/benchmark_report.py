"""Writes the figures in the documents, and the plots, from docs/results alone.

python scripts/benchmark_report.py            # after new result files were copied to docs/results
python scripts/benchmark_report.py --check    # exit status 1 where a document differs
"""

import argparse

from benchmarks import documents, headline, plots


def main() -> int:
    """Rewrites, or says what would change."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = 0
    for document in documents.DOCUMENTS:
        text, path = documents.regenerate(document), documents.ROOT / document
        if text == path.read_text():
            continue
        stale += 1
        print(f"{document} {'differs from the result files' if check else 'written'}")
        if not check:
            path.write_text(text)
    if not check:
        for suite in documents.SUITES:
            for path, result in documents.load(suite).items():
                for picture in plots.draw(result, (documents.ROOT / path).with_suffix("")):
                    print(f"{picture.relative_to(documents.ROOT)} drawn")
        for picture, draw in headline.pictures(documents.ROOT).items():
            draw(picture)
            print(f"{picture.relative_to(documents.ROOT)} drawn")
    return stale if check else 0


if __name__ == "__main__":
    raise SystemExit(main())
