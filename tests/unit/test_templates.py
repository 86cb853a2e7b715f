"""Templates of others: what they may say, and what stops them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from llmcompress import templates
from llmcompress.data import chat
from llmcompress.errors import LLMCompressError
from llmcompress.templates import Renderer, TemplateRefusalError, render_chat
from tests import tiny_models


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


TURNS = "{% for m in messages %}\n  <|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}\n"
CHATS = {
    "turns": TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "blocks": "{%- for m in messages -%}\n    {% if loop.first %}{{ bos_token }}{% endif %}\n    {% generation %}{{ m.content }}\n    {% endgeneration %}{% endfor %}\n",
    "tools": "{% for t in tools or [] %}{{ t | tojson(indent=2) }}{{ t.function.name | tojson }}{% endfor %}{{ documents is none }}",
    "controls": "{% set ns = namespace(n=0, x=dict(a=1)) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ ns.x.a }}{% break %}{% endfor %}",
    "missing": "{{ unheard_of }}{% if unheard_of is defined %}x{% endif %}{{ pad_token is defined }}{{ strftime_now('%Y') }}",
    "calls": "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}{% endfor %}{{ m.reasoning_content }}{% endfor %}",
    "variable": "{{ enable_thinking if enable_thinking is defined else 'unset' }}<é\U0001f600&\"'>",
}  # fmt: skip
MESSAGES = [
    {"role": "system", "content": " be <brief> & kind "},
    {"role": "user", "content": "Hi \u00e9\U0001f600", "name": None},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1.5, "b": [True, None]}}}], "reasoning": "so"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d\n\"q\"", "parameters": {"type": "object", "properties": {}}}}]  # fmt: skip


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_a_chat_reads_as_transformers_renders_it(case: str, variables: dict[str, Any], tokenizer: Any) -> None:
    tokenizer.chat_template = CHATS[case]
    for messages in (MESSAGES, MESSAGES[:2]):
        for tools in (None, TOOLS):
            for prompt in (False, True):
                asked = {"add_generation_prompt": prompt, **variables}
                theirs = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **asked)
                assert render_chat(tokenizer, messages, tools, **asked) == theirs


def test_a_template_by_name_is_chosen_as_transformers_does(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    assert [render_chat(tokenizer, MESSAGES, tools) for tools in (None, TOOLS)] == ["plain", "with tools"]


def test_a_template_that_refuses_a_conversation_may_take_the_next(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') if messages|length > 2 else 'fine' }}"
    with pytest.raises(TemplateRefusalError, match="roles must alternate"):
        render_chat(tokenizer, MESSAGES)
    assert render_chat(tokenizer, MESSAGES[:2]) == "fine"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    ],
)
def test_a_chat_template_without_end_is_no_fault_of_a_row(
    template: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is refused is left out and the next one read; of such a template every row would take its seconds."""
    with Renderer(1.0, "chat") as impatient:
        monkeypatch.setitem(templates._chats, os.getpid(), impatient)
        tokenizer.chat_template = template
        with pytest.raises(LLMCompressError, match="cannot be rendered"):
            chat.render(tokenizer, MESSAGES)


def test_rows_that_take_long_each_are_stopped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS_IN_ALL", 0.2)
    monkeypatch.setattr(templates, "SECONDS_ON_AVERAGE", 0.01)
    with Renderer() as renderer, pytest.raises(LLMCompressError, match="texts took") as caught:
        for _ in range(1000):
            renderer.render("{% for i in range(99999) %}{% for j in range(3) %}{% endfor %}{% endfor %}", {})
    assert not isinstance(caught.value, TemplateRefusalError)
