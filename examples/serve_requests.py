"""A server in which each request chooses its experts; requests with the same set are batched continuously.

python examples/serve_requests.py
python examples/serve_requests.py MODEL --port 8000     # serve a model of your own, until interrupted

    POST /v1/completions {"prompt": "...", "experts": ["public", "math"], "max_tokens": 16}
    GET /v1/experts

A manager of transformers has one set of experts, so there is one manager per set, made at its first request.
"""

import argparse
import json
import tempfile
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from use_a_model import build

import flexmoe  # noqa: F401 - registers the model with the Auto classes


class Service:
    """Answers prompts with a set of experts each. `most` limits the sets, because each has a KV cache."""

    def __init__(self, folder: Path, most: int = 4) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._most, self._managers, self._making = most, {}, threading.Lock()

    def complete(self, prompt: str, experts: list[str], max_tokens: int) -> str:
        """What follows the prompt. ValueError: an unknown expert, or too many sets; the message says which exist."""
        manager = self._manager(tuple(sorted(set(experts))))
        ids = self.tokenizer(prompt)["input_ids"]
        request = manager.add_request(ids, max_new_tokens=max_tokens)
        result = manager.get_result(request_id=request, timeout=60)
        if result is None or result.error:
            raise RuntimeError(result.error if result else "no answer within a minute")
        return self.tokenizer.decode(result.generated_tokens, skip_special_tokens=True)

    def _manager(self, experts: tuple[str, ...]):
        with self._making:
            if experts not in self._managers:
                if len(self._managers) == self._most:
                    raise ValueError(f"there are {self._most} sets of experts in use: {sorted(self._managers)}")
                manager = self.model.init_continuous_batching(
                    GenerationConfig(eos_token_id=self.tokenizer.eos_token_id, pad_token_id=0, do_sample=False),
                    # CUDA graphs could not look up what a request has read, by which experts with evidence are chosen
                    continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, use_cuda_graph=False),
                    experts=list(experts),
                )
                manager.start()
                self._managers[experts] = manager
            return self._managers[experts]

    def stop(self) -> None:
        """Ends the managers; until then the model's experts cannot be changed."""
        for manager in self._managers.values():
            manager.stop(block=True)


def server(service: Service, port: int) -> ThreadingHTTPServer:
    """An HTTP server on this machine only; put one that authenticates in front of it to open it to others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"experts": service.model.expert_names})

        def do_POST(self) -> None:
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                experts, most = request.get("experts", service.model.expert_names), int(request.get("max_tokens", 16))
                self._answer(200, {"text": service.complete(request["prompt"], experts, most), "experts": experts})
            except (KeyError, TypeError, ValueError) as error:
                self._answer(400, {"error": str(error)})
            except RuntimeError as error:
                self._answer(500, {"error": str(error)})

        def _answer(self, status: int, body: dict) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def ask(port: int, **request: object) -> dict:
    """One request to the server."""
    url = f"http://127.0.0.1:{port}/v1/completions"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(request).encode())) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or a Hub id; without it, a tiny one is asked and the end")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        service = Service(arguments.model or build(Path(temporary)))
        web = server(service, arguments.port)
        if arguments.model:
            print(f"serving on http://127.0.0.1:{web.server_port}, experts {service.model.expert_names}")
            web.serve_forever()
        threading.Thread(target=web.serve_forever, daemon=True).start()
        for experts in (["public"], ["public", "math"], ["public", "law"]):
            print(experts, ask(web.server_port, prompt="find x: x + 1 = 2", experts=experts, max_tokens=8))
        web.shutdown()
        service.stop()
        service.model.remove_expert("math")  # possible again
        print("served; experts left:", service.model.expert_names)


if __name__ == "__main__":
    main()
