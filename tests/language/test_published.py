"""The reader of the published task file: small files made here, in the form of that file."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlab.errors import HeadlabError
from synthetic_tasks import published_tasks
from synthetic_tasks.language.published import task_factors

TEXT = (
    "\n< Ann has a fox. Bob has tea. >. Ann has a kind of animal\n"
    "< Ann has a fox. Bob has tea. >. Bob has a kind of [ hot drink ]\n"
    "There are Washington, D.C, Rome, Rome. Which is not Rome? The city in [ the United States ]\n"
)


def line(task="task2", texts=TEXT):
    return json.dumps({"task_id": task, "texts": texts})


def write(folder, *lines):
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_brackets_are_marks_and_spans_point_into_what_is_left(tmp_path):
    first, second = published_tasks(write(tmp_path, line(), "", line(texts=TEXT.replace("hot drink", "tool")), ""))
    assert first.text == TEXT.strip().replace("[ ", "").replace(" ]", "")
    assert first.text.startswith("< Ann")
    assert first.text.endswith("the United States")
    drink, city = first.answers
    assert [first.text[slice(*a.span)] for a in first.answers] == ["hot drink", "the United States"]
    assert [a.text for a in first.answers] == ["hot drink", "the United States"]
    assert first.text[slice(*drink.query)] == "Bob has a kind of"
    assert first.text[slice(*city.query)] == "Which is not Rome? The city in"
    assert drink.choices == ("hot drink", "the United States", "tool") == second.answers[0].choices  # of the whole task
    assert drink.record is drink.matched is drink.reported is None


@given(st.lists(st.tuples(st.text("ab. <>", max_size=9), st.text("xyz'", min_size=1, max_size=5)), min_size=1, max_size=5))
def test_texts_without_their_marks(tmp_path_factory, parts):
    path = write(tmp_path_factory.mktemp("tasks"), line(texts="\n" + "\n".join(f"<{q} [ {a} ]" for q, a in parts) + "\n"))
    (context,) = published_tasks(path)
    assert context.text == "\n".join(f"<{query} {answer}" for query, answer in parts)
    assert [context.text[slice(*answer.span)] for answer in context.answers] == [answer for _, answer in parts]
    for answer, (query, _) in zip(context.answers, parts, strict=True):
        asked = context.text[slice(*answer.query)]
        assert f"<{query} ".rstrip().endswith(asked)
        assert ". " not in asked.strip() or asked == ""


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("task0", "possession person related yes plain"),
        ("task3", "possession person related no swapped"),
        ("task5", "possession related person yes swapped"),
        ("task8", "possession person item yes plain"),
        ("task15", "possession item person no swapped"),
        ("task16", "city person related yes plain"),
        ("task31", "city item person no swapped"),
        ("task34", "use person related no plain"),
        ("task37", "use related person yes swapped"),
        ("task40", "adjective person related yes plain"),
        ("task47", "adjective related person no swapped"),
        ("task48", "time person related yes plain"),
        ("task55", "time related person no swapped"),
        ("task56", "odd odd item yes plain"),
        ("task59", "odd odd related no swapped"),
        ("task65", "odd odd item no swapped"),
        ("task67", "odd odd related no swapped"),
        ("task73", "odd odd related no swapped"),
    ],
)
def test_factors_by_number(tmp_path, task, expected):
    (context,) = published_tasks(write(tmp_path, line(task)))
    names = ("relation", "looked_up", "reported", "negation", "order")
    assert context.factors == dict(zip(names, expected.split(), strict=True))
    assert context.difficulty == expected.count("related")


def test_every_combination_comes_twice_at_most_but_for_the_odd_ones():
    found = [tuple(task_factors(f"task{i}").values()) for i in range(74)]
    assert len(found[:56]) == len(set(found[:56]))
    assert sum(f[3] == "yes" for f in found) == 37 == sum(f[4] == "plain" for f in found)


@pytest.mark.parametrize("task", ["task74", "task", "mine", "task-1", "task1x", "task" + "9" * 50, "task\u0663"])
def test_other_tasks_have_no_factors(tmp_path, task):
    (context,) = published_tasks(write(tmp_path, line(task)))
    assert context.factors == {}
    assert context.difficulty is None
    assert context.task == task


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"task_id": ', "not JSON"),
        ("[1]", '"task_id" and "texts"'),
        (json.dumps({"task_id": "task1"}), '"task_id" and "texts"'),
        (json.dumps({"texts": TEXT}), '"task_id" and "texts"'),
        (json.dumps({"task_id": 3, "texts": TEXT}), '"task_id" and "texts"'),
        (line(texts="no answers here"), "no answer in brackets"),
        (line(texts=""), "no answer in brackets"),
        (line(texts="a [ b"), "do not pair up in 'a \\[ b'"),
        (line(texts="a ] b [ c ]"), "do not pair up"),
        (line(texts="a [ [ b ] ]"), "do not pair up"),
        (line(texts="a [ b\nc ]"), "do not pair up"),
        (line(texts="a [ ]"), "empty answer"),
    ],
)
def test_lines_that_do_not_parse(tmp_path, bad, message):
    with pytest.raises(HeadlabError, match=rf"tasks.jsonl, line 3 .*{message}"):
        published_tasks(write(tmp_path, line(), line(), bad, line()))


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(HeadlabError, match="is empty"):
        published_tasks(write(tmp_path, "", " "))
    for missing in (tmp_path / "none.jsonl", (tmp_path / "none.jsonl").as_uri(), tmp_path, "http://127.0.0.1:1/tasks"):
        with pytest.raises(HeadlabError, match="cannot read the task file"):
            published_tasks(missing)
    with pytest.raises(HeadlabError, match="cannot read the task file http://\\[bad"):
        published_tasks("http://[bad/tasks")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(HeadlabError, match="UTF-8 \\(byte 3\\)"):
        published_tasks(tmp_path / "latin")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            self.server.stop.wait(5)
        body = line().encode()
        self.send_response(200 if self.path in ("/tasks", "/cut") else 404)
        self.send_header("Content-Length", str(len(body) + 7 * (self.path == "/cut")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_addresses(tmp_path):
    path = write(tmp_path, line())
    assert published_tasks(path.as_uri()) == published_tasks(str(path))
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.stop = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert published_tasks(f"{address}/tasks") == published_tasks(path)
        with pytest.raises(HeadlabError, match="Not Found"):
            published_tasks(f"{address}/other")
        with pytest.raises(HeadlabError, match="IncompleteRead"):
            published_tasks(f"{address}/cut")
        with pytest.raises(HeadlabError, match="timed out"):
            published_tasks(f"{address}/slow", timeout=0.2)
    finally:
        server.stop.set()
        server.shutdown()
        thread.join()
        server.server_close()
