"""Texts of a data set are text on the page, whatever they hold, and nothing on it leads elsewhere."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml

from codiemb.figures.markup import clean, element, escape
from codiemb.report.page import write_report
from tests.report import runs

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><style>*{display:none}",
    "</title></svg></script><img src=x onerror=alert(1)>",
    "]]><!--",
    "--><iframe src='//evil.example'>",
    '" onmouseover="alert(1)" x=\'',
    "&lt;b&gt; &amp;amp; & &#x3C;script&#x3E;",
    "`${alert(1)}` {{7*7}} <%= 1 %>",
    "javascript:alert(1)",
    "\u202eesrever\u202c \u2066isolate \u200f\u05d0\u05d1 \u0627\u0644",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f next \x85 \ufffe",
    "w" * 5000,
    "\U0001f469\u200d\U0001f4bb \u4e2d\u6587 e\u0301",
]
SURROGATE = "half a pair: \ud83d and \udc00"  # JSON can hold it, Parquet cannot


def hostile_run(folder, text):
    """A run that has the text in every place where one can stand."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 1, "model": {"base": text}}), errors="replace")
    runs.write_json(
        folder / "environment.json",
        {"versions": {"codiemb": text, text: "1"}, "device": text, "device_name": text, "seed": text},
    )
    runs.write_plan(folder, {text: "retrieval", f"{text} 2": "similarity", "odd": text}, warnings=[text])
    plan = json.loads((folder / "plan.json").read_text())
    plan["schedule"] = text
    plan["sources"][text]["dropped"] = {text: 3}
    plan["overlap"] = [{"data_set": text, "source": text, "texts": 3, "shared": 2}]
    (folder / "plan.json").write_text(json.dumps(plan))
    lines = [
        runs.step_line(n, text if n % 2 else f"{text} 2", "retrieval" if n % 3 else text, **{f"loss/{text}": 1 / n})
        for n in range(1, 9)
    ]
    runs.write_steps(folder, lines)
    (folder / "eval").mkdir()
    readable = clean(text)
    for model in ("base", "model", "step-3", "delta"):
        tasks = {text: "retrieval", f"{text} 2": "similarity", "odd": text}
        shift = 0.2 if model == "model" else 0.0
        for number, (data_set, task) in enumerate(tasks.items()):
            out = folder / "eval" / model
            known = task if task in ("retrieval", "similarity") else "similarity"
            runs.write_evaluation(
                folder, model, {f"set{number}": 0.5}, {f"set{number}": known}, shift, (readable, readable), text
            )
            content = json.loads((out / f"set{number}.json").read_text())
            content |= {"dataset": data_set, "task": task}
            content["metrics"][text] = 0.25
            (out / f"set{number}.json").write_text(json.dumps(content))
    line = runs.difference(text, 0.5, 0.5, text, "retrieval") | {"metric": text, "reference": 0.25, "model": 0.25}
    means = [runs.difference("", 0.5, 0.5, text, task) for task in ("retrieval", "all", text)]
    runs.write_json(folder / "comparison.json", {
        "reference": "base", "settings": {"test": text, "confidence": text, "resamples": text},
        "comparisons": [{"model": name, "data_sets": [line], "means": means} for name in ("model", "delta")],
    })  # fmt: skip
    layers = [{"layer": n, "rank": n, text: n} for n in range(3)]
    runs.write_json(folder / "geometry.json", {
        "texts": 3, "cka": {"reference": text, "models": [{"model": "model", "layers": layers, "pooled": 0.5}]},
        "models": [{"model": name, "layers": layers, "pooled": {text: 1.0, "said": text}} for name in (text, "model")],
    })  # fmt: skip
    conflict = {"step": 1, "cosine": {"all": 0.1, text: -0.2}, "gradient_norm": {text: 1.0}}
    (folder / "conflict.jsonl").write_text(json.dumps(conflict) + "\n")
    runs.write_json(
        folder / "fused" / "delta" / "fusion.json", {"method": text, "parents": [{"path": text}], "weights": text}
    )
    trials = [
        {"checkpoints": [text, text], "settings": {text: text}, "scores": {text: 0.1 * n, "b": 0.2}} for n in (1, 2)
    ]
    runs.write_json(folder / "pareto.json", {"tasks": [text, "b"], "points": trials, "front": [1], "knee": 1})
    return folder


class Balance(HTMLParser):
    """Reads as a browser does, and keeps elements, attributes and texts; every element is closed in its turn."""

    VOID = ("meta", "br", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.comments = [], set(), [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.comments.append(data)


def read(text):
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return read(
        write_report(hostile_run(tmp_path_factory.mktemp("plain") / "run", "harmless")).read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("hostile", [*HOSTILE, SURROGATE], ids=range(len(HOSTILE) + 1))
def test_a_hostile_text_stays_text(tmp_path, plain, hostile):
    """The page has the elements and the names of attributes that it has with a harmless text, and no others."""
    page = write_report(hostile_run(tmp_path / "run", hostile)).read_bytes().decode("utf-8")
    parser = read(page)
    assert parser.tags == plain.tags
    assert {key for key, _ in parser.attributes} == {key for key, _ in plain.attributes}
    assert parser.comments == []
    ElementTree.fromstring(page.partition("\n")[2])  # strict, all of it
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(drawing)
    shown = clean(hostile)[:150]
    told = [text for text in parser.texts if shown in text]
    # source names, warnings, queries, results, prompts, config ...: everywhere
    assert len(told) > 60
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", page)


@pytest.mark.parametrize("hostile", ["https://evil.example/x.png", *HOSTILE[:6]])
def test_the_page_leads_nowhere(tmp_path, hostile):
    """Offline means offline: no address in any attribute, no script, and a policy that would forbid both."""
    page = write_report(hostile_run(tmp_path / "run", hostile)).read_text(encoding="utf-8")
    parser = read(page)
    assert not parser.tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "use",
        "image",
        "foreignobject",
    }
    leading = ("href", "src", "srcset", "action", "data", "xlink:href", "style", "background", "poster")
    addresses = [(key, value) for key, value in parser.attributes if key in leading or key.startswith("on")]
    assert addresses
    assert all(key == "href" and re.fullmatch("#[a-z]+", value) for key, value in addresses)
    policy = next(value for key, value in parser.attributes if key == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    (style,) = re.findall("<style>(.*?)</style>", page, flags=re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_names_the_style(tmp_path):
    """With another hash the browser shows a page without style."""
    runs.write_steps(tmp_path, [runs.step_line(1)])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    (style,) = re.findall("<style>(.*?)</style>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}';" in html.unescape(page)


def test_escaping_by_hand():
    assert escape("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert element("b", "<", class_='"><') == '<b class="&quot;&gt;&lt;">&lt;</b>'
    assert element("b", element("i", "&")) == "<b><i>&amp;</i></b>"
    assert clean("a\r\nb\rc\td\x00\ud800\u202e") == "a\nb\nc\td\ufffd\ufffd\ufffd"
