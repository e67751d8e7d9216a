"""Reading recorded traffic, and refusing what is wrong with its place."""

from pathlib import Path

import pytest

from cluster.errors import ConfigError
from deploy.loadtest.planned import Part
from deploy.loadtest.servegen import read_clients
from deploy.loadtest.traces import read_azure, read_burstgpt, read_mooncake

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AT = "2023-11-16 18:15:4"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens\n"
MOONCAKE = '{{"timestamp": {}, "input_length": {}, "output_length": {}, "hash_ids": {}}}\n'


def test_reads_the_bundled_azure_excerpt() -> None:
    trace = read_azure()
    assert len(trace) == 600
    assert (trace[0].at_s, trace[0].prompt_tokens, trace[0].output_tokens) == (0.0, 374, 44)
    assert trace[1].at_s == pytest.approx(4.314579)


def test_mooncake_prompts_share_the_blocks_of_equal_hashes(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE.format(0, 1030, 5, [7, 8, 9]) + MOONCAKE.format(1500, 600, 1, [7, 3]))
    first, second = read_mooncake(path)
    assert first.parts == (Part("block 7", 512), Part("block 8", 512), Part("block 9", 6))
    assert (second.at_s, second.parts) == (1.5, (Part("block 7", 512), Part("block 3", 88)))


def test_burstgpt_is_read_by_its_header_and_without_failed_requests(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("Response tokens,Timestamp,Request tokens\n7,5,100\n0,6,50\n9,8.5,30\n")
    trace = read_burstgpt(path)
    assert [(r.at_s, r.prompt_tokens, r.output_tokens) for r in trace] == [
        (0.0, 100, 7),
        (3.5, 30, 9),
    ]


def test_servegen_clients_have_windows_and_lengths() -> None:
    clients = read_clients()
    assert [client.name for client in clients] == [f"client {n}" for n in (0, 3, 48, 62, 63)]
    window = clients[0].windows[4]
    assert (window.begin_s, window.end_s, window.pattern) == (2400.0, 3000.0, "Gamma")
    assert window.shape == pytest.approx(0.02232, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("azure", "", ":1: empty"),
        ("azure", "TIMESTAMP,ContextTokens\n", ":1: no 'GeneratedTokens'"),
        ("azure", AZURE.replace("\n", ",Cost\n"), ":1: unknown 'Cost'"),
        ("azure", AZURE + "yesterday,1,1\n", ":2: TIMESTAMP 'yesterday'"),
        ("azure", AZURE + f"{AT}6.68,1\n", ":2: 2 cells under 3"),
        ("azure", AZURE + f"{AT}6.68,1,x\n", ":2: GeneratedTokens 'x' is not a number"),
        ("azure", AZURE + f"{AT}6.68,0,1\n", ":2: ContextTokens must be at least 1"),
        ("azure", AZURE + f"{AT}6.68,1,1\n{AT}5.68,1,1\n", ":3: arrives 1 s before"),
        ("azure", AZURE + '"a,b\n', ":2: not a row of CSV"),
        ("azure", AZURE, ": no requests"),
        ("burstgpt", BURSTGPT + "-5,GPT-4,1,1\n", ":2: time '-5' must be 0 or more"),
        ("burstgpt", BURSTGPT + "5,GPT-4,1.5,1\n", ":2: Request tokens '1.5' is not a whole"),
        ("burstgpt", BURSTGPT + "nan,GPT-4,1,1\n", ":2: time 'nan'"),
        ("mooncake", "{\n", ":1: not a JSON object"),
        ("mooncake", MOONCAKE.format(0, 600, 1, "[1]"), ":1: 1 hash_ids for 600 tokens"),
        ("mooncake", MOONCAKE.format(0, 6, 1, '["1"]'), ":1: hash_ids must be"),
        ("mooncake", MOONCAKE.format(0, 6, 0, "[1]"), ":1: output_length must be at least 1"),
        ("mooncake", MOONCAKE.format(-1, 6, 1, "[1]"), ":1: time -1 must be"),
        ("mooncake", MOONCAKE.format(0, 6, 1, "[1]").replace("hash_", "h"), ":1: no 'hash_ids'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    read = {"azure": read_azure, "burstgpt": read_burstgpt, "mooncake": read_mooncake}[name]
    with pytest.raises(ConfigError) as refused:
        read(path)
    assert f"{path}{said}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(AZURE.encode() + b"\xff\n")
    with pytest.raises(ConfigError, match=r"trace\.csv:2: not UTF-8"):
        read_azure(path)
    with pytest.raises(ConfigError, match=r"/nowhere\.csv: No such file"):
        read_azure(Path("/nowhere.csv"))


@pytest.mark.parametrize(
    ("windows", "lengths", "said"),
    [
        ("0,1,1,Gamma,1\n", "{}", r"trace\.csv:1: 5 cells"),
        ("0,1,1,Pareto,1,1\n", "{}", r"trace\.csv:1: unknown pattern 'Pareto'"),
        ("0,-1,1,Gamma,1,1\n", "{}", r"trace\.csv:1: rate '-1' must be 0 or more"),
        ("0,1,1,Gamma,0,1\n", "{}", r"trace\.csv:1: a Gamma pattern needs a shape"),
        ("600,0,0,,0,0\n0,0,0,,0,0\n", "{}", r"trace\.csv:2: begins no later"),
        ("0,1,1,Gamma,1,1\n", "{", r"dataset\.json: not JSON"),
        ("0,1,1,Gamma,1,1\n", "{}", r"dataset\.json: no lengths in it"),
        ("0,1,1,Gamma,1,1\n", '{"0": {"input_tokens": "{1: 1.0}"}}', "no 'output_tokens'"),
        ("0,1,1,Gamma,1,1\n", '{"0": {"cost": "{}"}}', "unknown 'cost'"),
    ],
)
def test_a_wrong_servegen_folder_is_refused(
    tmp_path: Path, windows: str, lengths: str, said: str
) -> None:
    (tmp_path / "chunk-4-trace.csv").write_text(windows)
    (tmp_path / "chunk-4-dataset.json").write_text(lengths)
    with pytest.raises(ConfigError, match=said):
        read_clients(tmp_path)
