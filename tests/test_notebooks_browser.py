"""Notebooks as their readers see them: JupyterLab in a headless Chromium, all cells run, every figure drawn, no network."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import pytest

from tests.helpers.browser import browser
from tests.test_notebooks import FIGURES, FOLDER, PLOTLY

pytestmark = pytest.mark.slow

START, RUN = 120, 400  # seconds until JupyterLab answers, and until a notebook has run

RUN_ALL = """async () => {
    const panel = window.jupyterapp.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.headlabRan = true; });
}"""
IDLE = """() => window.headlabRan
    && window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"""
CELLS = "() => window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model.toJSON())"
SHOW = """number => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = number;
    return notebook.scrollToItem(number, 'start');
}"""
# The marks that are seen: bars, points, lines and pictures of heat maps inside axes, if they cover something.
MARKS = """number => {
    const cell = window.jupyterapp.shell.currentWidget.content.widgets[number];
    const marks = cell.node.querySelectorAll('.js-plotly-plot .mlayer :is(path, image)');
    const covers = box => box.width > 0 && box.height > 0;
    return [...marks].filter(mark => covers(mark.getBoundingClientRect())).length;
}"""


@contextmanager
def jupyterlab(root: Path, private: Path) -> Iterator[str]:
    """JupyterLab over a folder, with nobody's settings, no token and no network. Yields its address."""
    if find_spec("jupyterlab") is None:
        pytest.fail("JupyterLab is not installed: pip install headlab[notebook]", pytrace=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
        f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR",
                 "IPYTHONDIR"):  # fmt: skip
        own[name] = str(private / name.lower())
    settings = private / "jupyter_config_dir" / "labconfig" / "page_config.json"  # it would ask whether it may fetch news
    settings.parent.mkdir(parents=True)
    settings.write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    with open(private / "jupyterlab.log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(address, server, private / "jupyterlab.log")
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    direct = build_opener(ProxyHandler({}))
    end = time.monotonic() + START
    while time.monotonic() < end and server.poll() is None:
        try:
            with direct.open(f"{address}/api/status", timeout=5):
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-2000:]}", pytrace=False)


@pytest.mark.parametrize("name", ["02_composition_maps", "03_importance_and_pruning"])
def test_figures_are_drawn_in_jupyterlab(name: str, tmp_path: Path) -> None:
    root, private = tmp_path / "notebooks", tmp_path / "private"
    root.mkdir()
    private.mkdir()
    shutil.copy(FOLDER / f"{name}.ipynb", root)
    asked: list[str] = []
    with jupyterlab(root, private) as address, browser() as running:
        context = running.new_context(viewport={"width": 1200, "height": 900})
        page = context.new_page()
        page.set_default_timeout(1000 * START)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/lab/tree/{name}.ipynb")
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context")
        page.evaluate(RUN_ALL)
        page.wait_for_function(IDLE, timeout=1000 * RUN)

        cells = page.evaluate(CELLS)
        shown = {}
        for number, cell in enumerate(cells):
            outputs = cell.get("outputs", [])
            assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
            if any(PLOTLY in output.get("data", {}) for output in outputs):
                page.evaluate(SHOW, number)
                page.wait_for_function(f"number => ({MARKS})(number) > 0", arg=number)
                shown[cell["id"]] = page.evaluate(MARKS, number)
                page.screenshot(path=tmp_path / f"{cell['id']}.png")
        assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
        assert len(shown) == FIGURES[name], shown
        context.close()
    elsewhere = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert elsewhere == {"127.0.0.1"}
