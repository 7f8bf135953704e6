"""The page, in a real browser: it renders, moves between stages, finds, and keeps text text."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import normfx
from normfx.graphdiff.html import payload
from tests.models import Block, head, roughened

HOSTILE = '<script>alert(1)</script>"<img src=x onerror=alert(2)>'


class Open:
    """A page in the browser, with what it complained of."""

    def __init__(self, browser, path):
        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append("dialog"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")

    def texts(self, selector):
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture
def opened(browser):
    pages = []

    def open_(path):
        pages.append(Open(browser, path))
        return pages[-1]

    yield open_
    for found in pages:
        found.page.close()
        assert found.complaints == []
        assert [url for url in found.requests if not url.startswith("file:")] == []


@pytest.fixture(scope="module")
def diff():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), *[roughened(Block()) for _ in range(3)], *head())
    with torch.no_grad():
        return normfx.diff(model.eval(), options={"strict": True})(torch.ones(2, 8))


@pytest.fixture
def page(diff, tmp_path, opened):
    diff.html(tmp_path / "diff.html")
    return opened(tmp_path / "diff.html")


def test_it_shows_the_norms_and_both_stages(page):
    assert page.texts("#sites .name") == ["1.norm", "2.norm", "3.norm", "4"]
    assert "recentre" in page.texts("#sites li")[0]
    assert page.texts("#lefthead b, #righthead b") == ["capture", "lower"]
    assert "layer_norm" in "".join(page.texts(".row .gone"))
    assert "linear(v3, .weight'" in "".join(page.texts(".row .new"))
    assert re.search(r"bytes a call.*→", "".join(page.texts("#overview")), re.DOTALL)


def test_the_slider_and_the_arrow_keys_go_through_the_stages(page):
    page.page.locator("#slider").fill("1")
    assert page.texts("#righthead b") == ["recognise"]
    page.page.locator("#text").focus()
    page.page.keyboard.press("ArrowRight")
    assert page.texts("#righthead b") == ["rewrite"]
    page.page.locator("#beside").select_option("previous")
    assert page.texts("#lefthead b") == ["recognise"]


def test_a_line_gives_its_source_rule_proof_and_verdict(page):
    page.page.locator("#sites li").first.click()
    assert re.search(r"models\.py:\d+, in forward\n.*self\.norm\(x\)", page.texts("#detail")[0])
    page.page.locator("#sites li").nth(3).click()
    detail = page.texts("#detail")[0]
    assert "rms_norm" in detail
    assert "LN(x) = RMSNorm(x - mean(x))" in detail
    assert "refused: not-worth-it" in detail
    assert "the cost model expects no gain" in detail
    assert page.page.locator("#detail svg .part").count() >= 2


def test_search_finds_filters_and_goes_on(page):
    page.page.keyboard.press("/")
    page.page.keyboard.type("1.up")
    assert re.match(r"\d+ found", page.texts("#found")[0])
    page.page.keyboard.press("Enter")
    assert page.texts("#found")[0].startswith("1 of ")
    assert page.page.locator(".row.here").count() == 1
    page.page.locator("#filter").select_option("matches")
    assert all("1.up" in row for row in page.texts(".row"))
    page.page.locator("#search").fill("found nowhere")
    assert page.texts("#found") == ["0 found"]
    assert page.page.locator(".row").count() == 0


def test_the_keys_move_between_changes_and_switch_the_colours(page):
    page.page.locator("#text").focus()
    page.page.keyboard.press("n")
    first = page.page.locator(".row.here").get_attribute("data-row")
    page.page.keyboard.press("n")
    second = page.page.locator(".row.here").get_attribute("data-row")
    assert int(second) > int(first)
    page.page.keyboard.press("p")
    assert page.page.locator(".row.here").get_attribute("data-row") == first
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.page.evaluate(back)
    page.page.keyboard.press("t")
    assert page.page.evaluate(back) != light
    page.page.keyboard.press("?")
    assert page.page.locator("#keys").is_visible()


def test_the_colours_follow_the_system(diff, tmp_path, browser):
    diff.html(tmp_path / "diff.html")
    page = browser.new_page(color_scheme="dark")
    page.goto((tmp_path / "diff.html").as_uri())
    assert page.evaluate("document.documentElement.classList.contains('dark')")
    page.close()


def test_hostile_names_and_source_lines_stay_text(tmp_path, opened):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({HOSTILE: nn.LayerNorm(8)})

        def forward(self, x):
            return self.inner[HOSTILE](x) + 1  # <script>alert(3)</script> "quoted" '</script>

    with torch.no_grad():
        normfx.diff(Named().eval())(torch.ones(2, 8)).html(tmp_path / "hostile.html")
    page = opened(tmp_path / "hostile.html")
    assert "<script>alert(1)</script>" in page.texts("#sites .name")[0]
    page.page.locator("#sites li").first.click()
    assert "<img src=x onerror=alert(2)>" in page.texts("#detail")[0]
    assert '# <script>alert(3)</script> "quoted"' in page.texts("#detail")[0]
    assert page.page.locator("img").count() == 0
    assert page.page.locator("script").count() == 2


def test_ten_thousand_lines_need_no_ten_thousand_elements(tmp_path, opened):
    class Long(nn.Module):
        def forward(self, x):
            for _ in range(60):
                x = torch.relu(x) + 1
            return nn.functional.layer_norm(x, (8,))

    with torch.no_grad():
        diff = normfx.diff(Long())(torch.ones(2, 8))
    path = tmp_path / "long.html"
    diff.html(path)
    # the same nodes many times over: capturing so many would take a minute
    text = path.read_text(encoding="utf-8")
    start, stop = text.index('id="data">') + 10, text.index("</script>", text.index('id="data">'))
    data = json.loads(text[start:stop])
    graph = data["graphs"][0]
    for stage in graph["stages"]:
        stage["nodes"] = stage["nodes"] * 90
    count = len(graph["stages"][0]["nodes"])
    graph["rows"] = {key: [i for k in range(count) for i in (k, k)] for key in graph["rows"]}
    path.write_text(text[:start] + json.dumps(data) + text[stop:], encoding="utf-8")
    page = opened(path)
    assert count > 10_000
    assert page.page.locator(".row").count() < 100
    page.page.evaluate("document.getElementById('view').scrollTop = 150000")
    page.page.wait_for_function("document.querySelector('.row').dataset.row > 7000")
    assert page.page.locator(".row").count() < 100


def test_several_graphs_and_none(tmp_path, opened):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = head(8, 8), head(8, 4)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    with torch.no_grad():
        normfx.diff(Broken().eval())(torch.ones(2, 8)).html(tmp_path / "two.html")
    page = opened(tmp_path / "two.html")
    page.page.locator("#text").focus()
    page.page.keyboard.press("g")
    assert page.texts("#sites .name") == ["second.0"]
    normfx.GraphDiff(()).html(tmp_path / "none.html")
    assert "Choose a line" in opened(tmp_path / "none.html").texts("#detail")[0]


def test_every_rule_and_refusal_that_a_page_names_is_explained(diff):
    data = payload(diff.graphs)
    for graph in data["graphs"]:
        for site in graph["sites"]:
            for _, rule, _, code, _, _ in site["records"]:
                assert rule in data["rules"] or rule.startswith("recognise")
                assert not code or data["refusals"][code]["meaning"]
