"""The rules of the server: who may ask, what, and how much. Each rule has a test."""

import json
import re
import socket

import pytest
from records.fake_runs import write_run
from view_client import client_of, get

from flowgrain.view.assets import Assets
from flowgrain.view.security import is_loopback

VOTE = {"a": "run:demo@0", "b": "run:demo@4", "place": 0, "left": "a", "vote": "a"}
HEADERS = {"X-Flowgrain": "1"}
SECRET = "the content of a secret file"


@pytest.fixture
def folder(tmp_path):
    """A directory with a run, beside a secret file."""
    (tmp_path / "secret.txt").write_text(SECRET)
    write_run(tmp_path / "shown" / "demo", steps=4, evaluations=2, images=2)
    return tmp_path / "shown"


@pytest.fixture
def client(folder):
    return client_of(folder)


@pytest.mark.parametrize("prefix", ["/assets/", "/api/runs/", "/api/sources/", "/api/runs/demo/"])
@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "../../secret.txt",
        "..%2f..%2fsecret.txt",
        "%2e%2e/%2e%2e/secret.txt",
        "..%252f..%252fsecret.txt",
        "..%5c..%5csecret.txt",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "demo/run.yaml",
        "demo%2frun.yaml",
        "demo%00",
        "run:../secret@0",
        "run:%2fetc%2fpasswd@0",
    ],
)
def test_no_path_of_a_request_reaches_a_file(client, prefix, path):
    answer = client.get(prefix + path)
    assert answer.status_code == 404
    assert SECRET not in answer.text
    assert "root:" not in answer.text
    assert set(answer.json()) == {"error"}


def test_python_files_and_directories_are_no_assets(client):
    for name in ("", "vendor", "../app.py", "__init__.py", "index.html/"):
        assert client.get(f"/assets/{name}").status_code == 404, name


LINKS = {
    "run.yaml": "/api/runs/demo",
    "metrics.jsonl": "/api/runs/demo/metrics",
    "alarms.jsonl": "/api/runs/demo",
    "best.json": "/api/runs/demo",
    "calibration.json": "/api/runs/demo",
    "groups/step-000004.zip": "/api/runs/demo/groups/4",
    "evaluations/step-000004.json": "/api/runs/demo/evaluations/4",
    "evaluations/images-000004.zip": "/api/runs/demo/evaluations/4/0.webp",
    "groups": "/api/runs/demo/groups/4",
    "evaluations": "/api/runs/demo/evaluations/4",
}


@pytest.mark.parametrize("name", list(LINKS))
def test_a_link_out_of_the_directory_is_refused(folder, tmp_path, name):
    other = write_run(tmp_path / "other", steps=4, evaluations=2, seed=9)
    for file in ("best.json", "calibration.json"):
        (other / file).write_text(json.dumps({"secret": SECRET}))
    path = folder / "demo" / name
    if path.exists():
        path.rename(tmp_path / "moved")
    path.symlink_to(other / name)
    client = client_of(folder)
    answer = client.get(LINKS[name])
    assert answer.status_code in (404, 422)
    assert SECRET not in answer.text
    assert "symbolic link" in f"{get(client, '/api/runs')['damaged']}{answer.text}"


def test_a_linked_directory(folder, tmp_path):
    outside = write_run(tmp_path / "outside", steps=2)
    (folder / "away").symlink_to(outside)
    (folder / "again").symlink_to(folder / "demo")
    (folder / "loop").symlink_to(folder)
    found = get(client_of(folder), "/api/runs")
    assert [row["id"] for row in found["runs"]] == ["demo"]
    assert "Give its target as another directory" in found["damaged"][0]
    ids = [row["id"] for row in get(client_of(folder, outside), "/api/runs")["runs"]]
    assert ids == ["demo", "outside"]


@pytest.mark.parametrize("name", ["loop", *LINKS, "demo/scores", "run/run.yaml"])
def test_a_loop_of_links_stops_nothing(folder, name):
    path = folder / ("demo" if name in LINKS else "") / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(folder / "moved")
    path.symlink_to(path)
    client = client_of(folder)
    for address in ("/api/runs", "/api/sources"):
        assert get(client, address)
    for address in (*LINKS.values(), "/api/runs/run"):
        assert client.get(address).status_code in (200, 404, 422)


def test_a_link_inside_of_the_directory_is_followed(folder):
    metrics = folder / "demo" / "metrics.jsonl"
    metrics.rename(folder / "elsewhere.jsonl")
    metrics.symlink_to(folder / "elsewhere.jsonl")
    assert get(client_of(folder), "/api/runs/demo/metrics")["step"][-1] == 4


def test_a_link_in_place_of_the_votes(folder, tmp_path):
    (folder / "demo" / "arena").symlink_to(tmp_path)
    answer = client_of(folder).post("/api/votes", json=VOTE, headers=HEADERS)
    assert answer.status_code in (404, 422)
    assert not (tmp_path / "votes.jsonl").exists()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""]
)
@pytest.mark.parametrize("path", ["/", "/api/runs", "/assets/main.js", "/api/events"])
def test_a_domain_that_points_at_this_computer_is_refused(client, host, path):
    assert client.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:7860", "[::1]:80"])
def test_the_names_of_this_computer(client, host):
    assert client.get("/api/runs", headers={"Host": host}).status_code == 200


def test_the_names_of_a_server_for_other_computers(folder):
    client = client_of(folder, host="0.0.0.0", token="t0ken")
    client.get("/?token=t0ken")
    for host, status in (("192.168.1.5:7860", 200), ("evil.example", 403)):
        assert client.get("/api/runs", headers={"Host": host}).status_code == status


def test_no_request_asks_a_name_server(folder, monkeypatch):
    client = client_of(folder, host="0.0.0.0")
    monkeypatch.setattr(socket, "getfqdn", lambda: pytest.fail("a name server was asked"))
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/", headers={"Host": socket.gethostname()}).status_code == 200


OWN = ("127.0.0.1", "127.8.8.8", "::1", "localhost")


@pytest.mark.parametrize("host", [*OWN, "0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_which_addresses_are_of_this_computer_only(host):
    assert is_loopback(host) == (host in OWN)


def test_the_token(folder):
    client = client_of(folder, token="t0ken")
    paths = ("/", "/api/runs", "/assets/main.js", "/api/events", "/api/runs/demo/groups/4/0/0.webp")
    wrong = ("", "?token=", "?token=wrong", "?token=t0kenx", "?token=%FF%E4")
    for path in paths:
        for query in wrong:
            assert client.get(path + query).status_code == 401
    assert client.get("/api/runs?token=t0ken").status_code == 401  # only the first page
    assert client.post("/api/votes", json=VOTE, headers=HEADERS).status_code == 401
    answer = client.get("/?token=t0ken")
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 200
    assert "t0ken" not in answer.text
    assert "httponly" in cookie.lower()
    assert "samesite=strict" in cookie.lower()
    assert client.get("/api/runs").status_code == 200
    assert client.post("/api/votes", json=VOTE, headers=HEADERS).status_code == 201


@pytest.mark.parametrize("cookie", ["", "flowgrain=t0ken", '=;,"', "a" * 3000, "é"])
def test_a_wrong_cookie(folder, cookie):
    client = client_of(folder, token="t0ken")
    assert client.get("/api/runs", headers={"Cookie": cookie.encode()}).status_code == 401


@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/runs/x", "/assets/main.js", "/nowhere"])
def test_the_headers_of_every_answer(client, path):
    for answer in (client.get(path), client.get(path, headers={"Host": "evil.example"})):
        parts = answer.headers["content-security-policy"].split("; ")
        policy = dict(part.split(" ", 1) for part in parts)
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["style-src"] == policy["connect-src"] == "'self'"
        assert re.fullmatch(r"'self'( 'sha256-[\w+/]+=*')+", policy["script-src"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers


def test_every_script_of_the_page_is_allowed(client):
    scripts = re.findall(r"<script(?![^>]*src=)", client.get("/").text)
    assert len(Assets().script_hashes) == len(scripts) == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"])
@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/runs/demo", "/api/votes/export"])
def test_only_votes_are_written(client, method, path):
    assert client.request(method, path, headers=HEADERS).status_code == 405


def test_heads(client):
    for path in ("/", "/api/runs", "/api/events"):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_votes_of_other_sites_are_refused(client, folder):
    foreign = {**HEADERS, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    for headers in ({}, {"X-Flowgrain": "0"}, foreign):
        assert client.post("/api/votes", json=VOTE, headers=headers).status_code == 403
    assert not (folder / "demo" / "arena").exists()


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_cannot_embed(client, site):
    image = "/api/runs/demo/groups/4/0/0.webp"
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
    assert client.get(image, headers=headers).status_code == 403
    followed = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}  # a link to the page
    assert client.get("/", headers=followed).status_code == 200


def test_large_votes_and_addresses(client):
    padded = json.dumps({**VOTE, "padding": "x" * 5000})
    assert client.post("/api/votes", content=padded, headers=HEADERS).status_code == 413
    for body in (b"", b"{", b"\xff", b"[" * 4000):
        assert client.post("/api/votes", content=body, headers=HEADERS).status_code == 400
    assert client.get("/api/runs/" + "x" * 5000).status_code == 414
    assert client.get("/api/runs?" + "x" * 5000).status_code == 414


SCRIPT = "</script><script>alert(1)</script>"


def test_texts_of_runs_are_json_and_never_html(tmp_path):
    run = write_run(tmp_path / "x", steps=2, evaluations=2)
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace("name: x", f"name: {json.dumps(SCRIPT)}", 1))
    file = run / "evaluations" / "step-000002.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "prompts": [SCRIPT] * len(values["prompts"])}))
    client = client_of(tmp_path)
    assert get(client, "/api/runs")["runs"][0]["name"] == SCRIPT
    assert get(client, "/api/runs/x/evaluations/2")["prompts"][0] == SCRIPT
    answer = client.get(f"/api/runs/{SCRIPT}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
    assert SCRIPT not in client.get("/").text
