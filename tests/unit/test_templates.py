"""Templates of others: what they may say, and what stops them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llmcompress.errors import LLMCompressError
from llmcompress.templates import Renderer


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    with Renderer(seconds=2.0) as made:
        yield made


def test_plain_templates_are_those_of_lm_eval(renderer: Renderer) -> None:
    from lm_eval.utils import apply_template

    values = {"question": "Who?", "choices": ["a", "b"], "n": 3, "nested": {"x": [1, 2]}}
    for template in (
        "{{question}}\nAnswer:\n",
        "{% for c in choices %}{{loop.index}}. {{c}}\n{% endfor %}",
        "{{choices|join(', ')|upper}}{{nested.x[1] + n}}",
        "{{question|regex_replace('W(.)o', '\\\\1')}}",
        "{{['A', 'B'][n % 2]}}{% set total = n * 2 %}{{total}}{{question.split('?')[0]}}",
    ):
        assert renderer.render(template, values) == apply_template(template, values)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
        "{{ self._TemplateReference__context.environment.globals }}{{ ''.__class__ }}",
        "{{ lipsum.__globals__['os'].popen('touch FILE').read() }}",
        "{{ x.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format(x) }}",
        "{{ (x|attr('__class__')).__mro__ }}",
        "{{ missing }}",
        "{% for",
    ],
)
def test_what_reaches_out_of_the_sandbox_is_refused(template: str, renderer: Renderer, tmp_path: Path) -> None:
    target = tmp_path / "written"
    with pytest.raises(LLMCompressError, match="cannot be rendered"):
        renderer.render(template.replace("FILE", str(target)), {"x": [1]})
    assert not target.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxx{% endfor %}{% endfor %}",
        "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!'|regex_replace('(a+)+$', '') }}",
        "{{ 'x' * 10**10 }}",
        "{{ '%999999999d' % 1 }}",
        "{% set a = 'xxxxxxxxxx' %}" + "{% set a = a ~ a %}" * 60 + "{{ a|length }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    ],
)
def test_work_without_end_is_stopped(template: str, renderer: Renderer) -> None:
    began = time.monotonic()
    with pytest.raises(LLMCompressError, match="cannot be rendered"):
        renderer.render(template, {})
    assert time.monotonic() - began < 10
    assert renderer.render("{{ x }}", {"x": 1}) == "1", "the next one has a process of its own"
