"""Tables of labels as people have them: what their columns are, what their texts mean, whose rows they are."""

from __future__ import annotations

import datetime

import openpyxl
import pytest
import torch

from tests.slide_files import bag, write_labels
from umda_fast.data import inspect_source, load_source, pack_slides
from umda_fast.errors import DataError
from umda_fast.extras import MissingExtraError
from umda_fast.tasks.columns import parse_number

NAMES = [f"S{index:02d}" for index in range(24)]
PATIENTS = [f"P{index // 2}" for index in range(24)]
Y = [*"aabb"] * 6


@pytest.fixture
def root(tmp_path):
    """24 slides; `table(columns)` writes their labels, `bags(names)` other slides."""
    return write_bags(tmp_path / "d", NAMES)


def write_bags(root, names):
    for index, name in enumerate(names):
        path = root / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(bag(index, 4)[0]), path)
    return root


def table(root, columns, delimiter=","):
    return write_labels(root / "labels.csv", columns, delimiter)


def uses(root, **options):
    """Column -> what it was taken for."""
    return {use.name: use.use for use in inspect_source(root, **options).columns}


def task(root, texts, delimiter=",", **options):
    """Kind and classes of a column of labels, repeated to 24, or what of its labels is missing."""
    table(root, {"slide_id": NAMES, "y": (texts * 24)[:24]}, delimiter)
    (found,) = load_source(root, **options).tasks
    return found.kind, found.labels


class TestColumns:
    @pytest.mark.parametrize(
        "name",
        [
            *("case_id", "submitter_id", "bcr_patient_barcode", "pat_id", "patient.id", "Patient ID", "patient"),
            *("cases.submitter_id", "PatientID", "subject", "participant_id", "MRN"),
        ],
    )
    def test_patients_by_name(self, root, name):
        table(root, {name: PATIENTS, "slide_id": NAMES, "y": Y})
        assert uses(root) == {name: "patient", "slide_id": "bag", "y": "task (binary)"}
        assert sum(inspect_source(root).patients.values()) == 12

    def test_numbers_of_patients_are_names(self, root):
        table(root, {"submitter_id": [4711 + index // 2 for index in range(24)], "slide_id": NAMES, "y": Y})
        assert uses(root)["submitter_id"] == "patient"

    def test_patients_by_another_name(self, root):
        table(root, {"who": PATIENTS, "slide_id": NAMES, "y": Y})
        report = inspect_source(root)
        assert next((use.name, use.use) for use in report.columns) == ("who", "left out")
        assert "looks like an identifier; 12 different values" in report.columns[0].why
        assert "data.options.patient=who" in report.problems[0]
        assert report.faults == []
        assert uses(root, patient="who")["who"] == "patient"
        groups = [{int(name[1:]) // 2 for name in part.names} for part in load_source(root, patient="who").values()]
        assert sum(map(len, groups)) == 12
        assert uses(root, tasks=["who", "y"])["who"] == "task (multiclass)"
        assert uses(root, kinds={"who": "multiclass"})["who"] == "task (multiclass)"
        with pytest.raises(DataError, match=r"labels\.csv: patient: expected columns among who, .*got 'whose'"):
            load_source(root, patient="whose")

    @pytest.mark.parametrize(
        ("name", "texts", "why"),
        [
            ("note", [f"text {index}" for index in range(24)], "looks like an identifier; 24 different"),
            ("sample_id", [500 + 7 * index for index in range(24)], "called an identifier"),
            ("sampleId", [500 + 7 * index for index in range(24)], "called an identifier"),
            ("row", list(range(24)), "counts the rows"),
            ("accession2", [7100000 + 13 * index for index in range(24)], "looks like an identifier"),
            ("project", ["TCGA"] * 24, "the same value everywhere: 'TCGA'"),
            ("blank", [""] * 24, "no value for any bag"),
            ("slide", [f"x{index}" for index in range(24)], "another name of the bag"),
            ("fold", [0, 1, 2] * 8, "folds are"),
            ("", [5 * index for index in range(24)], "it has no name"),
            ("Unnamed: 0", [5 * index for index in range(24)], "it has no name"),
        ],
    )
    def test_no_tasks(self, root, name, texts, why):
        table(root, {name: texts, "slide_id": NAMES, "y": Y})
        report = inspect_source(root)
        assert [task.name for task in report.tasks] == ["y"]
        assert (report.columns[0].name, report.columns[0].use) == (name or "column 1", "left out")
        assert why in report.columns[0].why

    @pytest.mark.parametrize(
        ("texts", "kind"),
        [
            ([3 * index % 17 for index in range(24)], "regression"),
            ([f"{index}.5" for index in range(24)], "regression"),
            (["T1", "T2", "T3", "T4"] * 6, "multiclass"),
            ([140, 150] * 12, "binary"),
        ],
    )
    def test_tasks(self, root, texts, kind):
        table(root, {"slide_id": NAMES, "y": texts})
        assert uses(root)["y"] == f"task ({kind})"

    def test_nameless_columns_behind(self, root):
        lines = ["slide_id,y,,", *(f"{name},{y},," for name, y in zip(NAMES, Y, strict=True)), ",,,", ""]
        (root / "labels.csv").write_text("\n".join(lines))
        assert uses(root) == {"slide_id": "bag", "y": "task (binary)", "column 3": "left out", "column 4": "left out"}
        (root / "labels.csv").write_text("\n".join(["slide_id,y", *lines[1:]]))
        assert uses(root) == {"slide_id": "bag", "y": "task (binary)"}

    def test_bags_by_their_values(self, root):
        table(root, {"": NAMES, "y": Y})
        report = inspect_source(root)
        assert (report.columns[0].name, report.columns[0].use) == ("column 1", "bag")
        assert "bags are named by the column 1, whose values are their names" in report.description
        table(root, {"age": [f"{40 + index}.5" for index in range(24)], "image": NAMES, "y": Y})
        assert uses(root) == {"age": "task (regression)", "image": "bag", "y": "task (binary)"}

    def test_a_split_by_its_values(self, root):
        table(root, {"slide_id": NAMES, "y": Y, "set": ["Training", "training", "Test"] * 8})
        splits = load_source(root)
        assert splits.test.names == NAMES[2::3]
        assert "column 'set' is the split, by its values" in splits.description

    def test_no_task_at_all(self, root):
        table(root, {"slide_id": NAMES, "note": [f"text {index}" for index in range(24)]})
        report = inspect_source(root)
        assert report.problems[0].startswith(f"{root / 'labels.csv'}: expected labels of at least one task, got none")
        assert "'note' (looks like an identifier" in report.problems[0]
        assert report.faults == report.problems[:1]
        (root / "labels.csv").rename(root.parent / "clinical.csv")
        (root / "another.csv").write_text("a,b\n1,2\n")
        (fault,) = inspect_source(root).faults
        assert "no labels.csv or labels.tsv or labels.xlsx in it or beside it; is it clinical.csv? --set" in fault


class TestTexts:
    def test_numbers_as_a_person_writes_them(self):
        for text in ("0", "-3", "+5", "12.5", ".5", "5.", "1e-05", "1E+20", "2.5e3", "0.10"):
            assert parse_number(text) == float(text)
        texts = ("3_4", "0140", "00.5", "1e1", "", "x", "1,5", "0x10", "\N{ARABIC-INDIC DIGIT ONE}", "1" * 16, "nan")
        for text in texts:
            assert parse_number(text) is None
        assert parse_number("0140", said=True) == 140
        assert parse_number("1e1", said=True) == 10
        assert parse_number("3_4", said=True) is None

    @pytest.mark.parametrize(
        ("texts", "kind", "classes"),
        [
            (["null", "wildtype", "over"], "multiclass", ("null", "over", "wildtype")),
            (["None", "some"], "binary", ("None", "some")),
            (["3_4", "4_3"], "binary", ("3_4", "4_3")),
            (["3_4", "4_3", "3_3", "4_4", "4_5"], "multiclass", ("3_3", "3_4", "4_3", "4_4", "4_5")),
            (["0140", "0141"], "binary", ("0140", "0141")),
            (["1e1", "2e1"], "binary", ("1e1", "2e1")),
            (["1.0", "2.0", "3.0"], "multiclass", ("1", "2", "3")),
            (["a", "#N/A", "b", "NA", "n/a", "NaN", "<NA>", ""], "binary", ("a", "b")),
            (["inf", "sup"], "binary", ("inf", "sup")),
            (["'--", "Stage I", "Stage II"], "binary", ("Stage I", "Stage II")),
        ],
    )
    def test_classes(self, root, texts, kind, classes):
        assert task(root, texts) == (kind, classes)

    def test_other_words_for_missing(self, root):
        assert task(root, ["1", "2", "3", "unknown"]) == ("multiclass", ("1", "2", "3", "unknown"))
        said = "task 'y': 'unknown' is a value as others are, in 6 rows; if it means a missing one: --set "
        assert said + "'data.options.missing=[\"unknown\"]'" in load_source(root).description
        assert task(root, ["1", "2", "3", "unknown"], missing="unknown") == ("multiclass", ("1", "2", "3"))
        assert inspect_source(root, missing=["unknown"]).tasks[0].missing["train"]
        table(root, {"slide_id": NAMES, "y": [*map(str, range(20, 43)), "?"]})
        with pytest.raises(DataError, match=r"column 'y': expected numbers, got '\?'; .*missing=\[\"\?\"\]"):
            load_source(root)
        table(root, {"slide_id": NAMES, "y": [*map(str, range(20, 32)), *["?"] * 12]})
        assert load_source(root).tasks == ()  # as many words as numbers: no numbers
        table(root, {"slide_id": NAMES, "y": [*(str(20 + age % 10) for age in range(21)), "?", "?", "?"]})
        with pytest.raises(DataError, match=r"column 'y': expected numbers, got '\?'"):
            load_source(root)
        table(root, {"slide_id": NAMES, "y": [*(f"{age}.5" for age in range(20, 43)), "-999"]})
        assert "task 'y': '-999' is a value as others are" in load_source(root).description

    def test_decimal_commas(self, root):
        for delimiter in ";\t|":
            assert task(root, [f"{index},5" for index in range(12)], delimiter) == ("regression", None)
        splits = load_source(root)
        assert splits.whole.labels["y"][:3].tolist() == [0.5, 1.5, 2.5]
        assert "column 'y': decimal commas, '0,5' is 0.5" in splits.description
        assert task(root, ["1.234,5", "12", "0,25", "-1,5"], ";") == ("regression", None)
        assert load_source(root).whole.labels["y"][:4].tolist() == [1234.5, 12, 0.25, -1.5]
        assert task(root, ['"1,5"', '"2,25"', "3", "NA"]) == ("regression", None)
        with pytest.raises(DataError, match=r"column 'y': expected numbers as 1234 or 1\.234, got '1,234', which may"):
            task(root, ['"1,234"', '"2,345"'])
        assert task(root, ["a,b", "c"], ";") == ("binary", ("a,b", "c"))
        table(root, {"slide_id": NAMES, "mpp": ["0,25"] * 24, "dose": ["1,5", "2"] * 12, "y": Y}, ";")
        splits = load_source(root, metadata=["dose"])
        assert splits.whole.metadata.values[:2, 0].tolist() == [1.5, 2.0]

    def test_numbers_in_metadata(self, root):
        table(root, {"slide_id": NAMES, "dose": ["3_4"] * 24, "y": Y})
        with pytest.raises(DataError, match=r"column 'dose': expected numbers, got '3_4' for 'S00'"):
            load_source(root, metadata=["dose"])

    def test_classes_of_a_model_trained_before(self, root):
        """0140 was once read as 140."""
        kind, _ = task(root, ["0140", "0141"])
        old = [load_source(root).tasks[0].__class__("y", kind, labels=("140", "141"))]
        assert load_source(root, kinds=old).whole.labels["y"][:2].tolist() == [0, 1]

    @pytest.mark.parametrize(("head", "encoding"), [("sep=;\n", "utf-8"), ("", "utf-16"), ("", "utf-8-sig")])
    def test_as_spreadsheets_save_them(self, root, head, encoding):
        text = head + "slide_id;grün\n" + "".join(f"{n};{y}\n" for n, y in zip(NAMES, Y, strict=True))
        (root / "labels.csv").write_text(text, encoding=encoding)
        assert uses(root) == {"slide_id": "bag", "grün": "task (binary)"}

    def test_too_many_classes(self, tmp_path):
        names = [f"S{index}" for index in range(66)]
        root = write_bags(tmp_path / "d", names)
        table(root, {"slide_id": names, "site": ["".join(chr(97 + index % 22) * 3) for index in range(66)]})
        with pytest.raises(DataError, match=r"column 'site': expected classes, got 22 different .*ignore='\[site\]'"):
            load_source(root)
        assert load_source(root, tasks=["site"]).tasks[0].classes == 22

    @pytest.mark.parametrize(
        ("above", "row"),
        [("Cohort 2023\n", 2), ("Cohort 2023,\n,\n", 3), ("# made by x\n# on Monday\n", 3), ("#a,b\n#1,1\n", 3)],
    )
    def test_titles_and_comments(self, root, above, row):
        text = "slide_id,y\n" + "".join(f"{n},{y}\n" for n, y in zip(NAMES, Y, strict=True))
        (root / "labels.csv").write_text(above + text)
        assert uses(root) == {"slide_id": "bag", "y": "task (binary)"}
        assert f"the table begins with its row {row}, below a title or comments" in load_source(root).description

    @pytest.mark.parametrize("head", ["#slide_id,y", "slide_id,y"])
    def test_a_header_is_no_title(self, root, head):
        (root / "labels.csv").write_text(f"{head}\n" + "".join(f"{n},{y}\n" for n, y in zip(NAMES, Y, strict=True)))
        assert uses(root) == {"slide_id": "bag", "y": "task (binary)"}
        assert "title" not in load_source(root).description

    def test_what_may_be_one(self, root):
        names = [f"{'Pp'[index % 2]}{index // 4}" for index in range(24)]
        table(root, {"slide_id": NAMES, "patient": [*names[:22], "", ""], "y": ["Tumour", "tumour", "none"] * 8})
        report = inspect_source(root)
        assert "task 'y': 'Tumour' and 'tumour' are different classes; are they one?" in report.problems
        assert f"{root / 'labels.csv'}: 'P0' and 'p0' are different patients; are they one?" in report.problems
        assert "2 bags without a patient, each one of its own" in report.description
        assert report.faults == []

    def test_another_encoding(self, root):
        (root / "labels.csv").write_bytes("slide_id,y\nS00,groß\n".encode("latin-1"))
        with pytest.raises(DataError, match="expected a readable table in UTF-8, got another encoding in row 2"):
            load_source(root)

    def test_a_formula_that_failed(self, root):
        table(root, {"slide_id": NAMES, "y": ["1", "#REF!", "2"] * 8})
        with pytest.raises(DataError, match=r"row 3: column 'y': expected a value, got #REF!, a formula's error"):
            load_source(root)


class TestSpreadsheets:
    def write(self, path, rows, title="Sheet1", formats=()):
        book = openpyxl.Workbook()
        book.active.title = title
        for row in rows:
            book.active.append(row)
        for cell, form in formats:
            book.active[cell].number_format = form
        book.save(path)
        return book

    def test_cells(self, tmp_path):
        root = write_bags(tmp_path / "d", ["00005", "115", *(f"{index:05d}" for index in range(100, 110))])
        rows = [["slide_id", "grade", "age", "on", "hot"]]
        for index, name in enumerate([5, 115.0, *range(100, 110)]):
            rows.append([name, index % 3, 40.5 + index, datetime.datetime(2020, 1, 1 + index), index % 2 == 0])
        formats = [(f"A{row}", "00000") for row in range(2, 14) if row != 3]
        self.write(root / "labels.xlsx", rows, formats=formats)
        assert list(uses(root).items()) == [
            ("slide_id", "bag"),
            ("grade", "task (multiclass)"),
            ("age", "task (regression)"),
            ("on", "left out"),
            ("hot", "task (binary)"),
        ]
        whole = load_source(root).whole
        assert whole.labels["age"][whole.names.index("115")] == 41.5
        pack_slides(root, tmp_path / "packed")
        assert load_source(tmp_path / "packed").tasks == load_source(root).tasks

    def test_sheets_and_formulas(self, root):
        rows = [["slide_id", "y"], *([name, y] for name, y in zip(NAMES, Y, strict=True))]
        book = self.write(root / "labels.xlsx", [["a legend"]], "about")
        for row in (sheet := book.create_sheet("Labels"), rows)[1]:
            sheet.append(row)
        book.save(root / "labels.xlsx")
        assert "sheet 'Labels' of labels.xlsx, not 'about'" in load_source(root).description
        sheet["B3"] = "=1+1"
        book.save(root / "labels.xlsx")
        with pytest.raises(DataError, match=r"labels\.xlsx: cell B3: a formula without a value"):
            load_source(root)
        (root / "labels.xlsx").write_bytes(b"no archive")
        with pytest.raises(DataError, match=r"labels\.xlsx: expected a readable \.xlsx table"):
            load_source(root)

    def test_without_openpyxl(self, root, monkeypatch):
        (root / "labels.xlsx").write_bytes(b"")
        monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
        with pytest.raises(MissingExtraError, match=r"labels\.xlsx: .* needs openpyxl, of the extra io"):
            load_source(root)


class TestRows:
    def test_a_row_for_each_patient(self, tmp_path):
        names = [f"TCGA-0{index // 2}-01Z-DX{index % 2}" for index in range(16)]
        root = write_bags(tmp_path / "d", [*names, "other-1"])
        rows = {"bcr_patient_barcode": [*(f"TCGA-0{index}" for index in range(10)), "TCGA-1"], "y": [*"ababababaab"]}
        table(root, rows)
        splits = load_source(root)
        labels = dict(zip(splits.whole.names, splits.whole.labels["y"].tolist(), strict=True))
        assert [labels[name] for name in names[:4]] == [0, 0, 1, 1]
        assert labels["other-1"] != labels["other-1"]
        assert "by the column 'bcr_patient_barcode', a row for each patient" in splits.description
        assert "3 patients of it without a bag" in splits.description
        assert sum(inspect_source(root).patients.values()) == 9  # and the slide that is nobody's
        for part in splits.values():
            assert {name[:-1] + "0" for name in part.names if "DX" in name} <= set(part.names)
        pack_slides(root, tmp_path / "packed")
        packed = load_source(tmp_path / "packed")
        assert packed.test.names == splits.test.names
        assert uses(tmp_path / "packed") == {"slide_id": "bag", "patient": "patient", "y": "task (binary)"}
        table(root, {name: [*cells, cells[0]] for name, cells in rows.items()})
        with pytest.raises(DataError, match="patient 'TCGA-00': expected one row, got another in row 13"):
            load_source(root)

    def test_a_folder_for_each_patient(self, tmp_path):
        root = write_bags(tmp_path / "d", [f"P{index // 2}/scan{index}" for index in range(24)])
        table(root, {"who": [f"P{index}" for index in range(12)], "y": [*"ab"] * 6})
        whole = load_source(root).whole
        assert [whole.names[row] for row in (whole.labels["y"] == 0).nonzero()[0][:3]] == ["scan0", "scan1", "scan12"]
        assert inspect_source(root).patients == {"train": 8, "val": 2, "test": 2}

    @pytest.mark.parametrize("beside", [True, False])
    @pytest.mark.parametrize(
        ("names", "written"),
        [
            ([f"{index:05d}" for index in range(24)], [str(index) for index in range(24)]),
            ([str(index) for index in range(24)], [f"{index}.0" for index in range(24)]),
            (NAMES, [name.lower() for name in NAMES]),
        ],
    )
    def test_names_written_otherwise(self, tmp_path, beside, names, written):
        root = write_bags(tmp_path / "d", names)
        table(root.parent if beside else root, {"slide_id": written, "y": Y})
        with pytest.raises(DataError) as error:
            load_source(root, skip_bad=True)  # no bad files: they would all lose their labels
        assert "labels.csv: missing slides: expected names as those of the files" in str(error.value)
        assert f"got {written[0]!r} for {names[0]!r}, {written[1]!r} for {names[1]!r}" in str(error.value)

    def test_names_of_others(self, root):
        table(root.parent, {"slide_id": [f"T{index:02d}" for index in range(24)], "y": Y})
        (fault,) = inspect_source(root).faults
        assert str(root.parent / "labels.csv") in fault
        assert "labels for missing slides: 'T00', 'T01', 'T02' and 21 more; there are 24 slides: S00, " in fault
        assert "'T01' is most like 'S01'" in fault
        table(root, {"slide_id": [f"T{index:02d}" for index in range(24)], "y": Y})
        with pytest.raises(DataError, match="labels for missing slides: 'T00'"):
            load_source(root, skip_bad=True)
        table(root, {"slide_id": [*NAMES[:23], "T23"], "y": Y})
        with pytest.raises(DataError, match=r"'T23'; there are .* 'T23' is most like 'S23'"):
            load_source(root)
        assert len(load_source(root, skip_bad=True).skipped) == 1
        table(root, {"slide_id": [*NAMES, "S-01"], "y": [*Y, "a"]})  # not S01 written otherwise, which has its row
        assert "'S-01'" in load_source(root, skip_bad=True).skipped[0]


class TestSplits:
    SPLIT = ("train", "test") * 12

    def test_a_column_that_parts_patients(self, root):
        table(root, {"case_id": PATIENTS, "slide_id": NAMES, "y": Y, "split": self.SPLIT})
        splits = load_source(root)
        report = inspect_source(root)
        assert report.first_problem == (
            f"{root / 'labels.csv'}: patient P0: expected in one split, got train and test (12 of 12 are in several)"
        )
        assert len(report.faults) == 12
        with pytest.raises(DataError, match="patient P0: expected in one split"):
            splits.check()
        load_source(root, ignore=["case_id"]).check()
        parted = load_source(root, skip_bad=True)
        assert (len(parted.train), len(parted.test)) == (0, 12)

    def test_names_in_files_written_otherwise(self, tmp_path):
        """As pandas writes whole numbers beside blanks."""
        names = [str(100 + index) for index in range(24)]
        root = write_bags(tmp_path / "d", names)
        table(root, {"slide_id": names, "y": Y})
        floats = [f"{name}.0" for name in names]
        parts = {"train": names[:12], "val": [*names[12:18], *[""] * 6], "test": [*floats[18:], *[""] * 6]}
        write_labels(root / "splits_0.csv", {"": list(range(12)), **parts})
        with pytest.raises(DataError, match=r"splits_0\.csv: missing slides: .* got '118\.0' for '118', .*\(6 such"):
            load_source(root, skip_bad=True)

    @pytest.mark.parametrize("by", ["table", "file"])
    def test_a_split_that_lost_all_its_slides(self, root, by):
        test = [f"T{index:02d}" for index in range(6)]
        if by == "table":
            columns = {"slide_id": [*NAMES, *test], "y": [*Y, *Y[:6]], "split": ["train"] * 24 + ["test"] * 6}
            table(root, columns)
        else:
            table(root, {"slide_id": NAMES, "y": Y})
            write_labels(root / "splits_0.csv", {"train": NAMES, "test": [*test, *[""] * 18]})
        with pytest.raises(DataError, match=r"s(_0)?\.csv: test: expected some of its 6 slides, got none that can"):
            load_source(root, skip_bad=True)

    def test_files_that_part_patients(self, root):
        table(root, {"case_id": PATIENTS, "slide_id": NAMES, "y": Y})
        parts = {"train": NAMES[:17], "val": [*NAMES[18:20], *[""] * 15], "test": [NAMES[17], *NAMES[20:], *[""] * 12]}
        write_labels(root / "splits_0.csv", {"": list(range(17)), **parts})
        report = inspect_source(root)
        assert report.faults == [f"{root / 'splits_0.csv'}: patient P8: expected in one split, got train and test"]
        kept = load_source(root, skip_bad=True)
        assert kept.train.names == NAMES[:16]
        assert kept.test.names == [NAMES[17], *NAMES[20:]]
        assert "patient P8" in kept.skipped[0]
