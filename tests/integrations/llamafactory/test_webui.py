"""LLaMA Board in a real browser: train, chat and predict with the settings of the kt_sft panel."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest

from kt_sft.integrations.llamafactory import args, webui
from tests.helpers.browser import open_page
from tests.helpers.llamafactory_runs import environment, workspace


class FakeManager:
    """Elements are their own names."""

    def get_elem_by_id(self, name):
        return name


def asked(use=True, method="INT8", path="", more="{}"):
    values = dict(
        zip(("top.use_kt", "top.kt_method", "top.kt_weight_path", "top.kt_settings"), (use, method, path, more))
    )
    return webui.settings(FakeManager(), values)


def test_panel_gives_configuration_keys():
    assert asked() == {"use_kt": True, "kt_method": "INT8"}
    assert asked(path="x.gguf", method="GGUF") == {"use_kt": True, "kt_method": "GGUF", "kt_weight_path": "x.gguf"}
    assert asked(more='{"cpu_infer": 2}')["cpu_infer"] == 2
    assert asked(use=False, more="nonsense") == {}
    for text in ("nonsense", "[1]", '{"a": }'):
        with pytest.raises(ValueError, match="KT settings: expected a JSON object") as caught:
            asked(more=text)
        example = re.search(r"such as (\{.*?\})", str(caught.value))
        assert example is None or set(json.loads(example[1])) <= set(args.KEYS)


@contextmanager
def board(work):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = environment(GRADIO_SERVER_NAME="127.0.0.1", GRADIO_SERVER_PORT=str(port), BROWSER="true")
    command = [sys.executable, "-m", "llamafactory.cli", "webui"]
    with (
        (work / "webui.log").open("w") as log,
        subprocess.Popen(command, env=env, cwd=work, stdout=log, stderr=log) as server,
    ):
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def is_up(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.status == 200


def finished(page):
    text = page.text()
    assert "Failed." not in text, text[text.index("Failed.") :]
    return "Finished." in text


@pytest.mark.slow
def test_train_chat_and_predict_on_the_page(tmp_path):
    work = workspace(tmp_path)
    with board(work) as url, open_page("about:blank", work) as page:
        page.wait("server", lambda: is_up(url), 300)
        page.driver.get(url)
        page.wait("page", lambda: "Ready." in page.text())
        page.fill("Model name", "Custom", choose=True)
        page.fill("Model path", str(work / "model"))
        page.fill("Chat template", "chatml", choose=True)
        page.fill("kt_method", "INT8", choose=True)
        page.fill("KT settings", "nonsense")
        page.fill("Dataset", "sums", choose=True)
        page.fill("Epochs", "1.0")
        page.fill("Output dir", "first", choose=True)
        page.open("Extra configurations")
        page.fill("Extra arguments", '{"optim": "adamw_torch", "max_steps": 2}')
        page.press("Start")
        page.wait("message", lambda: "KT settings: expected a JSON object" in page.text())
        page.fill("KT settings", '{"kt_int4_group_size": 64}')
        page.press("Preview command")
        page.wait("command", lambda: "--kt_method INT8" in page.text() and "--kt_int4_group_size 64" in page.text())
        page.press("Start")
        page.wait("end of training", lambda: finished(page), 300)
        adapter = work / "saves" / "Custom" / "lora" / "first"
        assert json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]
        log = (adapter / "running_log.txt").read_text()
        assert "trainable params" in log

        page.press("Chat")
        page.fill("Checkpoint path", "first", choose=True)
        page.press("Load model")
        page.wait("model", lambda: "Model loaded" in page.text(), 300)
        page.driver.find_element("xpath", '//textarea[@placeholder="Input..."]').send_keys("add 3 and 1")
        page.fill("Maximum new tokens", "8")
        page.press("Submit")
        page.wait("question", lambda: "add 3 and 1" in page.text())
        bots = "//div[contains(@class, 'bot') and contains(@class, 'message')]"
        page.wait("answer", lambda: page.driver.find_elements("xpath", bots)[-1].text.strip())
        page.press("Unload model")
        page.wait("model gone", lambda: "Model unloaded" in page.text())

        page.press("Evaluate & Predict")
        page.fill("Dataset", "sums", choose=True)
        page.fill("Max samples", "3")
        page.fill("Maximum new tokens", "4")
        page.fill("Output dir", "predicted", choose=True)
        page.press("Start")
        page.wait("end of prediction", lambda: "predict_bleu-4" in page.text(), 300)
    rows = (work / "saves" / "Custom" / "lora" / "predicted" / "generated_predictions.jsonl").read_text().splitlines()
    assert len(rows) == 3
