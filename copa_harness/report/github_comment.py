"""Write the comment of a pull request, or update the one that is there, for `.github/actions/copa/action.yml`.

    python -m copa_harness.report.github_comment reports/comment.md

Reads TOKEN, NUMBER, GITHUB_REPOSITORY and, if there are such, PAGE (where the page can be downloaded) and NAME (of a
job among several) from the environment. The first line of the file marks the comment. Standard library only. A token
that may not write, as that of a pull request from a fork, is a warning: the same text stands in the job's summary.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PER_PAGE = 100


def ask(method: str, path: str, content: dict[str, str] | None = None) -> Any:
    """One request to GitHub's API; the JSON of its answer."""
    request = urllib.request.Request(
        f"{os.environ.get('GITHUB_API_URL', 'https://api.github.com')}/repos/{os.environ['GITHUB_REPOSITORY']}{path}",
        method=method,
        data=None if content is None else json.dumps(content).encode(),
        headers={
            "Authorization": f"Bearer {os.environ['TOKEN']}",
            "Accept": "application/vnd.github+json",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def known_comment(number: str, mark: str) -> int | None:
    """The id of the comment that begins with the mark; None if there is none yet."""
    page = 1
    while True:
        comments = ask("GET", f"/issues/{number}/comments?per_page={PER_PAGE}&page={page}")
        for comment in comments:
            if (comment.get("body") or "").startswith(mark):
                return int(comment["id"])
        if len(comments) < PER_PAGE:
            return None
        page += 1


def main(file: str) -> None:
    """Write or update."""
    path = Path(file)
    if not path.is_file():
        print(f"::warning::no comment: {file} was not written, the suite did not come to an end")  # noqa: T201 - GitHub reads it
        return
    body = path.read_text(encoding="utf-8")
    if name := os.environ.get("NAME"):
        body = body.replace(" -->", f", {name} -->", 1)
    if page := os.environ.get("PAGE"):
        body += f"\n[The page with every example]({page})\n"
    number, mark = os.environ["NUMBER"], body.splitlines()[0]
    try:
        known = known_comment(number, mark)
        if known is None:
            ask("POST", f"/issues/{number}/comments", {"body": body})
        else:
            ask("PATCH", f"/issues/comments/{known}", {"body": body})
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403, 404):
            raise
        print(f"::warning::no comment: GitHub answered {error.code}; it needs permissions: pull-requests: write")  # noqa: T201 - GitHub reads it


if __name__ == "__main__":
    main(sys.argv[1])
