"""The command `python -m npser.corpus`: what a corpus is recognised as."""

import pytest
import soundfile
from conftest import write_tone

from npser.errors import UserError
from npser.inventory import main


@pytest.fixture
def corpus(tmp_path):
    for n, name in enumerate(["03a01Wa.wav", "03a02Wa.wav", "03a01Fa.wav", "08a01Na.wav"]):
        write_tone(tmp_path / "wav" / name, 200 + n, seconds=1 + n)
    write_tone(tmp_path / "wav" / "other.wav", 100)
    return tmp_path


def test_counts_durations_and_what_is_left_out(corpus, capsys):
    assert main([str(corpus)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "EMO-DB: 4 recordings, 3 emotions, 2 speakers, 2 texts"
    assert out[2].split() == ["speaker", "neutral", "anger", "happy", "all"]
    assert [line.split() for line in out[4:7]] == [
        ["03", "0", "2", "1", "3"],
        ["08", "1", "0", "0", "1"],
        ["all", "1", "2", "1", "4"],
    ]
    assert "10 s in all; 1.00 to 4.00 s, mean 2.50 s; sampled at 16000 Hz (4)" in out
    assert out[-2:] == ["left out: 1 file", "  wav/other.wav: not an EMO-DB file name"]


def test_many_skipped_files_are_cut(corpus, capsys):
    for n in range(14):
        write_tone(corpus / "wav" / f"x{n:02d}.wav", 100)
    main([str(corpus)])
    assert "and 5 more (--all lists them)" in capsys.readouterr().out
    main([str(corpus), "--all"])
    assert "x13.wav" in capsys.readouterr().out


def test_check_reads_everything(corpus, capsys):
    """EMO-DB's names promise EMO-DB's recordings: two are others, one cannot be read; 03a02Wa is no name of it."""
    (corpus / "wav" / "08a01Na.wav").write_bytes(b"garbage" * 100)
    assert main([str(corpus), "--check"]) == 2
    captured = capsys.readouterr()
    assert "1 of 4 recordings are in order" in captured.out
    assert "1 could not be opened: --check says why" in captured.out
    assert captured.err.count("not the published recording") == 2
    assert captured.err.count("cannot be read as audio") == 1


def test_folders_of_emotions(tmp_path, capsys):
    write_tone(tmp_path / "joy" / "a.wav", 200)
    soundfile.write(tmp_path / "joy" / "b.flac", [0.1, 0.2] * 4000, 8000)
    write_tone(tmp_path / "rage" / "a.wav", 300)
    assert main([str(tmp_path), "--check"]) == 0
    out = capsys.readouterr().out
    assert "3 recordings, 2 emotions, speakers unknown" in out
    assert "16000 Hz (2), 8000 Hz (1)" in out
    assert "3 of 3 recordings are in order" in out


def test_demo(capsys):
    assert main(["demo", "--check"]) == 0
    assert "420 recordings, 7 emotions, 10 speakers" in capsys.readouterr().out


def test_no_corpus(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        main([str(tmp_path / "absent")])
