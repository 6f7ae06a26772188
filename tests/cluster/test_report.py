"""The report: one page that needs nothing but itself, says what the run says, and runs nothing that a run contains."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tyro
from made_up_runs import MadeUpRun
from PIL import Image

from cluster.cli import main
from cluster.command_line import recipe_words
from cluster.ledger import read_ledger
from cluster.report_charts import HEIGHT, WIDTH, draw_chart, draw_time
from cluster.report_page import list_checkpoints, render_report
from pipeline.store import Store
from trainer import recipes
from trainer.checkpoint_commit import Commit, FileRecord
from trainer.config import TrainConfig
from trainer.metrics import EventLog
from trainer.run_files import open_run

HOSTILE = """"><script>document.title='owned'</script><img src=x onerror=alert(1)>'&{{ 7*7 }}"""
VOID = {"meta", "hr", "br", "img", "link", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page is made of; fails where an element is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.words.append(data)


def make_run(run: Store, seed: int = 7) -> Store:
    """A run of several attempts, with a checkpoint of each kind."""
    open_run(run, replace(recipes.get("demo"), optim=replace(recipes.get("demo").optim, num_steps=777)), "ab" * 32)
    made = MadeUpRun(random.Random(seed))
    made.live()
    made.write(run)
    for step, files in ((5, {"a": 10}), (6, {"a": 10, "b": 2}), (7, {}), (8, {"a": 10})):
        directory = f"checkpoints/step_{step:09d}"
        run.write(f"{directory}/a", b"0123456789")
        if files:
            commit = Commit(step, step * 8, 2, {name: FileRecord(size, "00000000") for name, size in files.items()})
            run.write(f"{directory}/{'commit.damaged' if step == 8 else 'commit'}.json", commit.to_json())
    return run


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return make_run(Store(str(tmp_path / "run")))


def test_the_page_is_whole_and_needs_nothing_else(run: Store) -> None:
    html = render_report(run)
    page = Page(html)
    assert "://" not in html
    assert not re.search(r"url\(|@import|javascript:", html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert any(name == "content" and "default-src 'none'" in (value or "") for name, value in page.attributes)
    assert page.tags.count("figure") == 4


def test_the_page_says_what_the_ledger_says(run: Store) -> None:
    page, ledger = Page(render_report(run)), read_ledger(run)
    assert len(ledger.rows) > 1
    assert f"{ledger.goodput * 100:.1f}%" in page.text
    for kind in ("training", "waiting for data", "saving", "lost work", "loading", "starting", "restarting", "idle"):
        assert kind in page.text
    assert page.text.count("training with 2 workers") == sum(row.facts.started is not None for row in ledger.rows)
    last_step = ledger.rows[-1].facts.last_step or 0
    assert f"step {last_step} of 777" in page.text
    assert f"epoch {last_step / 7:.2f}" in page.text
    share = page.text.partition(" share ")[2].split()[:9]
    assert share[0] == "100%"
    assert sum(float(one.rstrip("%")) for one in share[1:]) == pytest.approx(100, abs=0.4)


def test_the_widths_of_the_bars_are_the_shares(run: Store) -> None:
    html, ledger = render_report(run), read_ledger(run)
    bars = dict(re.findall(r'<i class="(\w+)" style="width: ([\d.]+)%"', html))
    for kind, seconds in ledger.seconds.items():
        assert float(bars.get(kind, 0)) == pytest.approx(seconds / ledger.wall_s * 100, abs=1e-3)
    slices = draw_time(ledger)
    for kind, seconds in ledger.seconds.items():
        area = sum(one.width * one.height / 100 for one in slices if one.kind == kind)
        assert area == pytest.approx(seconds / ledger.wall_s * 100, abs=0.5)


def test_what_a_run_contains_is_text_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(Store(str(tmp_path / 'run "><b onclick=x>')))
    log = EventLog(run.child("attempts/0009"))
    log.add("damage", path=HOSTILE, reason=HOSTILE)
    log.add("start", step=0, world_size=1, hosts=[HOSTILE])
    log.add("notice", node=HOSTILE, source=HOSTILE, action=HOSTILE, deadline=None)
    log.add("quarantined", step=1, sample_id=1, replacement_id=2, reason=HOSTILE)
    log.add("lost", error=HOSTILE, detected=HOSTILE)
    log.add("ended", outcome=HOSTILE)
    page = Page(render_report(run))
    assert not {"script", "img", "b onclick"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>document.title='owned'</script>") >= 6
    assert "{{ 7*7 }}" in page.text
    assert 'run "><b onclick=x>' in page.text


def test_checkpoints_are_told_apart(run: Store) -> None:
    states = {checkpoint.step: checkpoint.state for checkpoint in list_checkpoints(run, [])}
    assert states == {5: "committed", 6: "damaged", 7: "unfinished", 8: "damaged"}


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = Store(str(tmp_path / "run"))
    open_run(run, recipes.get("demo"), "ab" * 32)
    text = Page(render_report(run)).text
    for part in (
        "no driver has begun it",
        "No time is on record yet",
        "No step is on record yet",
        "tarmac pretrain demo --data",
    ):
        assert part in text


def test_it_is_written_to_the_run_or_to_a_file(
    store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Store(store_url)
    open_run(run, recipes.get("demo"), "ab" * 32)
    EventLog(run.child("attempts/0001")).add("start", step=0, world_size=3, began=1.0)
    before = [entry.path for entry in run.list()]
    out = tmp_path / "night.html"
    assert main(["report", store_url, "--out", str(out)]) == 0
    assert [entry.path for entry in run.list()] == before
    assert main(["report", store_url]) == 0
    assert "report.html" in capsys.readouterr().out
    assert {entry.path for entry in run.list()} - set(before) == {"report.html"}
    for page in (out.read_text(), run.read("report.html").decode()):
        assert Page(page).text.startswith(str(run))


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["{run}/absent"], 1, ["is not a run", "run.json"]),
        (["{run}", "--out", "{run}/report.png"], 2, ["must be the name of a .html file"]),
        (["{run}", "--out", "{run}/absent/report.html"], 2, ["must be in a folder that exists"]),
        ([], 2, ["run"]),
    ],
)
def test_what_cannot_be_is_refused_clearly(
    run: Store, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, parts: list[str]
) -> None:
    try:
        got = main(["report", *(word.format(run=run.url) for word in arguments)])
    except SystemExit as stop:  # tyro's
        got = int(str(stop.code))
    said = capsys.readouterr().err
    assert got == code
    assert "Traceback" not in said
    for part in parts:
        assert part in " ".join(said.split())


def test_a_damaged_part_is_named(run: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run.write("attempts/0001/metrics-000000.jsonl", b'{"step": 1}\n{broken\n')
    assert main(["report", run.url]) == 1
    assert "attempts/0001/metrics-000000.jsonl cannot be read" in " ".join(capsys.readouterr().err.split())


def test_the_command_gives_the_runs_config_again() -> None:
    demo, base = recipes.get("demo"), recipes.get("mae_base_800ep")
    changed = replace(
        base,
        data=replace(base.data, augment=replace(base.data.augment, image_size=(448, 224), crop_scale=(0.5, 1.0))),
        model=replace(base.model, norm_pix_loss=False),
        optim=replace(base.optim, num_steps=12, clip_norm=1.5),
        parallel=replace(base.parallel, compile=True, precision="fp32"),
        checkpoint=replace(base.checkpoint, asynchronous=False),
    )
    for config in (demo, base, changed):
        recipe, *options = recipe_words(config)
        assert tyro.cli(TrainConfig, args=options, default=recipes.get(recipe)) == config
    assert recipe_words(demo) == ["demo"]
    assert len(recipe_words(changed)) == 1 + 3 + 3 + 1 + 2 + 2 + 1 + 2 + 1


def test_a_curve_has_gaps_where_there_is_no_number_and_few_points_however_long() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, np.nan, 3.0])
    chart = draw_chart("t", np.arange(6), values, restarts=[0, 3, 99], label=str, from_zero=False)
    assert chart is not None
    assert [part.count("L") for part in chart.line.split("M")[1:]] == [1, 0, 0]
    assert chart.band == ""
    assert chart.marks == [0.0, 60.0]
    assert draw_chart("t", np.arange(2), np.array([np.nan, np.inf]), restarts=[], label=str) is None
    single = draw_chart("t", np.array([5]), np.array([2.0]), restarts=[], label=str)
    assert single is not None
    assert single.line.count("M") == 1

    steps = np.arange(1, 1_000_001)
    long = draw_chart("t", steps, np.where(steps % 500 == 0, 9.0, steps / 1e6), restarts=[], label=str)
    assert long is not None
    points = [tuple(map(float, point.rstrip("h0").split())) for point in re.split("[ML]", long.line)[1:]]
    assert len(points) <= 400
    x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    assert 0 <= x.min() < 0.01 * WIDTH
    assert x.max() > 0.99 * WIDTH
    assert (np.diff(y) < 0).all()  # it rises
    assert 0 < y.min() < y.max() <= HEIGHT
    assert long.band.startswith("M")


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt-get install chromium)")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it(run: Store, tmp_path: Path, width: int) -> None:
    EventLog(run.child("attempts/0009")).add("damage", path=HOSTILE, reason=HOSTILE)
    assert main(["report", run.url, "--out", str(tmp_path / "report.html")]) == 0
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--hide-scrollbars", f"--window-size={width},1600"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shot.png'}", "--dump-dom"),
        (tmp_path / "report.html").as_uri(),
    ]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, cwd=tmp_path).stdout
    page = Page(dom)
    assert not {"script", "img"} & set(page.tags)
    assert "<title>owned" not in dom
    assert HOSTILE in page.text
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.width == width
        colours = {colour for count, colour in shot.convert("RGB").getcolors(2**24) if count > 40}
    assert {(46, 139, 87), (179, 186, 193)} <= colours  # training's and idle's: the bars have been drawn
