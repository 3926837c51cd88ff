import pytest

from benchmarks import tables

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COLUMNS = (
    "run,model,variant,precision,width,height,batch,ms,ms_p20,ms_p80,first_call_s,peak_gib,nodes,error,eager_error"
)


def row(run, variant, ms, model="sd15", **more):
    fields = dict.fromkeys(COLUMNS.split(","), "")
    fields |= {"run": run, "variant": variant, "model": model, "ms": str(ms), "precision": "fp16"}
    fields |= {
        "width": "512",
        "height": "512",
        "batch": "2",
        "gpu": "some GPU",
        "torch": "2.11.0",
        "commit": "abcdef0123456",
    }
    return fields | {name: str(value) for name, value in more.items()}


def test_a_line_holds_the_figures_of_one_run():
    rows = [
        row("r1", "eager", 40),
        row("r1", "compile-reduce-overhead", 10, first_call_s=67),
        row("r1", "sfast", 8),
        row("r2", "eager", 44, peak_gib=2.5),
        row("r2", "compile-reduce-overhead", 7, first_call_s=66.04),
        row("r2", "sfast", 5, first_call_s=3.21, peak_gib=2.75, error=1.2e-3, eager_error=1.1e-3),
        row("r2", "sfast-again", 5, first_call_s=1.04),
        row("r3", "eager", 45),
    ]
    line = tables.table(rows).split("\n")[2]
    assert line == (
        "| sd15 fp16 | 512×512, 2 | 44.00 ms | 7.00 ms | **5.00 ms** | 8.80× / 1.40× "
        "| 66.0 / 3.2 / 1.0 s | 2.5 / 2.8 GiB | 1.1e-03 / 1.2e-03 |"
    )
    assert tables.HEADER.split("\n")[0].count("|") == line.count("|")
    assert tables.table(rows).endswith("run r2 on some GPU, torch 2.11.0, commit abcdef012.")


def test_what_was_not_measured_stays_empty():
    rows = [row("r1", "sfast", 5), row("r1", "compile-reduce-overhead", 6), row("r1", "eager", "")]
    line = tables.table(rows).split("\n")[2]
    assert (
        line == "| sd15 fp16 | 512×512, 2 | – | 6.00 ms | **5.00 ms** | – / 1.20× | – / – / – s | – / – GiB | – / – |"
    )


def test_a_run_without_its_peer_is_not_shown():
    rows = [row("r1", "compile-reduce-overhead", 7), row("r1", "sfast", 5), row("r2", "sfast", 4)]
    assert "**5.00 ms**" in tables.table(rows)
    assert tables.table(rows[2:]) == tables.NONE_YET


def test_other_sizes_and_the_strongest_compile_stand_in_a_table_of_their_own():
    rows = [
        row("r1", "compile-reduce-overhead", 700, width=1024, height=1024, batch=8),
        row("r1", "sfast", 400, width=1024, height=1024, batch=8),
        row("r1", "compile-reduce-overhead", 7),
        row("r1", "compile-max-autotune", 6, first_call_s=412.3),
        row("r1", "sfast", 5),
        row("r1", "sfast", 3, width=256, height=256),
    ]
    lines = tables.table(rows).split("\n")
    assert lines[2].startswith("| sd15 fp16 | 512×512, 2 | – | 7.00 ms | **5.00 ms** |")
    assert lines[4:6] == tables.OTHERS.split("\n")
    assert lines[6:8] == [
        "| sd15 fp16 | 1024×1024, 8 | 700 ms | **400 ms** | 1.75× |",
        "| sd15 fp16, max-autotune | 512×512, 2 | 6.00 ms after 412 s | **5.00 ms** | 1.20× |",
    ]
    assert lines[8] == ""


def test_a_few_models_at_a_glance():
    rows = [
        row("r1", "eager", 100, model="unknown"),
        row("r1", "compile-reduce-overhead", 7, first_call_s=66.04),
        row("r1", "sfast", 5, first_call_s=3.21),
        row("r1", "sfast", 3, width=256, height=256),
        row("r1", "compile-reduce-overhead", 5, width=256, height=256),
        row("r2", "eager", 60, model="sdxl", width=1024, height=1024),
        row("r2", "compile-reduce-overhead", 40, model="sdxl", width=1024, height=1024),
        row("r2", "sfast", 20, model="sdxl", width=1024, height=1024),
    ]
    lines = tables.glance(rows).split("\n")
    assert lines[0].startswith("| one denoiser step, some GPU | eager |")
    assert lines[2:5] == [
        "| sd15 fp16, 512×512, 2 | – | 7.00 ms | **5.00 ms** (–) | 66.0 / 3.2 s |",
        "| sdxl fp16, 1024×1024, 2 | 60.00 ms | 40.00 ms | **20.00 ms** (3.00×) | – / – s |",
        "",
    ]
    assert tables.glance([row("r1", "sfast", 5)]) == tables.NONE_YET


def test_models_without_sfast_are_left_out():
    assert tables.table([row("r1", "eager", 44)]) == tables.NONE_YET
    assert tables.table([]) == tables.NONE_YET


def test_fill_replaces_what_stands_between_the_markers_and_nothing_else():
    text = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    filled = tables.fill(text, "new")
    assert filled == f"above\n{BEGIN}\nnew\n{END}\nbelow\n"
    assert tables.fill(filled, "new") == filled


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", 2 * f"{BEGIN}{END}"])
def test_fill_refuses_a_text_without_its_markers(text):
    with pytest.raises(ValueError, match="once each"):
        tables.fill(text, "new")


def test_the_readme_shows_the_recorded_results():
    assert tables.main(["--check"]) == 0, "README.md is out of date: python -m benchmarks.tables"


def test_the_ladder_has_every_rung_and_what_it_gained():
    steps = ["eager", *(f"sfast-{rung}" for rung in tables.LADDER)]
    rows = [row("r1", step, 100 - 5 * i) for i, step in enumerate(steps)] + [row("r2", "eager", 50)]
    lines = tables.ladder(rows)
    assert len(lines) == 2 + len(steps) and lines[0] == "| each with those above it | sd15, 512×512, 2 |"
    assert lines[2] == "| eager | 100.00 ms |" and lines[4] == "| graph | 90.00 ms (1.06×) |"
    assert tables.ladder(rows[1:]) == []  # of another run than its rungs: eager is missing


def test_what_changing_adapters_costs():
    rows = [
        {"operation": operation, "variant": variant, "seconds": str(seconds), "retraces": traces, "recaptures": "0"}
        | {
            "peak_mib": "120.5",
            "run": run,
            "model": "sdxl",
            "gpu": "some GPU",
            "torch": "2.11.0",
            "commit": "abcdef0123",
        }
        for run in ("r1", "r2")
        for operation, variant, seconds, traces in (
            ("load", "eager", 1.25, "0"),
            ("load", "compile-hotswap", 30, "2"),
            ("scale", "eager", 0.5, "0"),
        )
    ]
    lines = tables.adapters(rows).split("\n")
    assert lines[0] == "| seconds | eager | compile-hotswap | memory |"
    assert lines[2:4] == ["| load | 1.25 | 30.00 (2, 0) | 120 / – MiB |", "| scale | 0.50 | – | 120 / – MiB |"]
    assert "run r2 on some GPU" in lines[-1]
    assert tables.adapters([]) == "Not measured yet."


def test_what_a_new_size_costs():
    row = {"run": "r1", "model": "sdxl", "width": "768", "height": "1344", "batch": "2", "traces": "1", "graphs": "14"}
    row |= {"first_s": "0.41", "again_s": "0.169", "extra_s": "0.243", "graph_gib": "0.93"}
    row |= {"gpu": "some GPU", "torch": "2.11.0", "commit": "abcdef0123"}
    assert tables.shapes([row]).split("\n")[2] == "| 768×1344, 2 | 0.41 s | 0.17 s | 0.24 s | 1, 14 | 0.93 GiB |"
