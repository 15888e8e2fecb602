"""The lesson runs from top to bottom, and the figures in its text are those that come out."""

import re

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
import nbformat

pytestmark = pytest.mark.lesson
FIGURE = re.compile(r"(\d+)%")
APART = 15  # points: another kind of CPU rounds otherwise, and then other tokens are drawn


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(ROOT / "lesson.ipynb", as_version=4)


def parts(notebook):
    """(the figures in the text that begins with Seen, those that the cells before it printed)."""
    printed = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for output in cell.outputs:
                printed += FIGURE.findall(output.get("text", ""))
        elif cell.source.startswith("**Seen:**"):
            yield FIGURE.findall(cell.source), printed
            printed = []


def test_the_text_tells_what_the_committed_outputs_say(committed):
    told_of_parts = [told for told, printed in parts(committed)]
    assert len(told_of_parts) == 7 and any(told_of_parts)
    for told, printed in parts(committed):
        assert set(told) <= set(printed)


def test_it_runs_and_comes_to_the_same(committed):
    fresh = nbformat.from_dict(committed)
    settings = {"timeout": 1200, "resources": {"metadata": {"path": str(ROOT)}}}
    nbclient.NotebookClient(fresh, **settings).execute()
    for (told, _), (_, printed) in zip(parts(committed), parts(fresh)):
        for figure in told:
            gaps = [abs(int(figure) - int(other)) for other in printed]
            assert min(gaps) <= APART, (figure, printed)
