"""The report of an experiment: what its cells say, written as Markdown, CSV, plots and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from maskgym.backbones import Backbone, EncodingBank
from maskgym.common.atomic import write_text
from maskgym.common.run_folder import command_line, environment
from maskgym.common.tracking import Tracker
from maskgym.envs.data.answer_length import answer_cut
from maskgym.envs.data.queries import DatasetQueries
from maskgym.envs.data.scoring import score
from maskgym.eval.experiment.cells import TIME, Cell, fill
from maskgym.eval.experiment.claims import answers, pairs, remarks
from maskgym.eval.experiment.page import Picture, write_page
from maskgym.eval.experiment.pictures import Shown, draw_adherence, draw_gallery, draw_learning, draw_tradeoff, is_ours
from maskgym.eval.experiment.summary import ArmResult, area_of, collect, comparisons, estimates, gaps, images_of, ranked
from maskgym.eval.experiment.tables import accuracy_table, comparison_table, convergence_table, cost_table, middle_table
from maskgym.eval.measure.failures import working
from maskgym.eval.measure.latency import device_name
from maskgym.eval.policies import load_planner
from maskgym.policies.planner import Planner

QUESTIONS = {
    "pruning": "Does a controller that learns which visual tokens to keep beat static token pruning at equal budgets?",
    "dimensions": "Do tokens, heads and layers together beat any two, and any one, of them at equal budgets?",
    "training": "Is policy-gradient training better than relaxation for the same controller?",
}
GALLERY_ARMS, GALLERY_QUERIES = 8, 6
PAGE = "report.html"


class Report:
    """Tables, pictures and page of an experiment's cells.

    Args:
        name: of the experiment.
        folder: where to write.
        cells: measured or not.
        seeds: of the trainings.
        budgets: in rising order.
        backbone: plans and answers the gallery's queries.
        queries: of the test split.
        max_new_tokens: as in ``outcomes``.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        cells: Sequence[Cell],
        seeds: Sequence[int],
        budgets: Sequence[float],
        backbone: Backbone,
        queries: DatasetQueries,
        max_new_tokens: int | None = None,
    ):
        self.name, self.folder, self.cells, self.budgets = name, folder, cells, budgets
        self.backbone, self.queries = backbone, queries
        self.cut = answer_cut(backbone, queries, max_new_tokens)
        self.results = collect(cells)
        self.found = estimates(self.results, queries.kinds)
        compared = comparisons(self.results, pairs(name), budgets, images_of(queries))
        tables = [
            accuracy_table(self.results, self.found, budgets),
            middle_table(self.results, self.found, budgets),
            comparison_table(compared),
            cost_table(self.results, budgets),
            convergence_table(self.results, budgets),
        ]
        self.tables = [table for table in tables if len(table.rows) > 1]
        self.answers = answers(name, self.results, compared, budgets)
        self.remarks = remarks(name, self.results, budgets)
        self.missing = gaps(self.results)
        self.drawn: list[Path] = []
        self.facts = {
            "data": f"{queries.name}, test split, n = {len(queries):,}",
            "seeds": ", ".join(map(str, seeds)),
            "trainings": trainings(self.results),
            "machine": device_name(backbone.device),
            **environment(),
        }

    def text(self) -> str:
        """Answers, gaps and tables as Markdown."""
        said = [f"- **{answer.question}** {answer.text}" for answer in self.answers]
        said += [f"- {remark}" for remark in self.remarks]
        missing = [f"- Without figures, {why}: {what}." for why, what in self.missing]
        parts = ["\n".join(lines) + "\n" for lines in (said, missing) if lines]
        return "\n".join([*parts, *(table.markdown() for table in self.tables)])

    def write(self) -> None:
        """Tables, pictures and page, into the folder."""
        folder, title = self.folder, f"Experiment: {self.name}"
        folder.mkdir(exist_ok=True)
        write_text(folder / "tables.md", f"# {title}\n\n{self.text()}")
        for table in self.tables:
            write_text(folder / f"{table.name}.csv", table.csv())
        pictures, gallery = self._pictures(), self._gallery()
        self.drawn = [picture.path for picture in (*pictures, *gallery)]
        write_page(
            folder / PAGE,
            title,
            QUESTIONS[self.name],
            self.answers,
            self.remarks,
            self.tables,
            pictures,
            gallery,
            self.missing,
            self.facts,
            self._commands(),
        )

    def track(self, project: str | None, group: str) -> None:
        """Send what was written to wandb, as one run of a group; nothing if no project is named."""
        tracker = Tracker(project, self.folder, self.facts, group)
        said = [[answer.question, answer.verdict, answer.text] for answer in self.answers]
        tables = {table.name: table.rows for table in self.tables}
        whole = [
            each
            for each in ranked(self.results, self.budgets)
            if each.budgeted and len(each.met(self.budgets)) == len(self.budgets)
        ]
        areas = {f"area/{each.name}": area_of(each, self.budgets) for each in whole}
        tracker.report(areas, {"answers": [["question", "verdict", "answer"], *said], **tables}, self.folder / PAGE)
        tracker.finish({path.stem: path for path in self.drawn})

    def _pictures(self) -> list[Picture]:
        if not any(result.records for result in self.results.values()):
            return []
        seeds = len({cell.seed for cell in self.cells})
        backbone, data = (Path(name).name for name in (self.backbone.name, self.queries.name))
        title = f"{backbone} on {data} (test, n = {len(self.queries):,}, seeds: {seeds})"
        pictures = []
        costs = {"llm_flops_ratio": "LLM FLOPs", "total_flops_ratio": "total FLOPs", TIME: "time to first token"}
        for field, words in costs.items():
            tradeoff = draw_tradeoff(self.results, self.found, self.budgets, field, title, self.folder)
            if tradeoff is not None:
                caption = f"Accuracy over {words}, best first. Bars: 95 % stratified-bootstrap intervals over seeds."
                pictures.append(Picture(tradeoff, caption))
        path = draw_adherence(self.results, self.budgets, self.folder)
        pictures.append(Picture(path, "What plans spend of what they may. Above 1 a budget would be broken."))
        learning = draw_learning(self.results, self.budgets, self.folder)
        if learning is not None:
            caption = "Validation accuracy in training: mean and standard deviation over seeds, and each seed, faint."
            pictures.append(Picture(learning, caption))
        return pictures

    def _gallery(self) -> list[Picture]:
        """What the budgeted arms kept for some queries at three budgets."""
        budgets = [self.budgets[0], self.budgets[len(self.budgets) // 2], self.budgets[-1]]
        measured = [result for result in ranked(self.results, self.budgets) if result.budgeted]
        measured.sort(key=lambda result: not is_ours(result.name))
        cells = [result.cells[0] for result in measured[:GALLERY_ARMS]]
        bank, picked = working(self.backbone, self.queries.spread(GALLERY_QUERIES))
        shown: list[dict[str, dict[float, Shown]]] = [{} for _ in range(len(picked))]
        for cell in cells:
            planner = load_planner(fill(cell.arm.policy, cell, self.cells), self.backbone, cell.seed)
            met = {record["budget"] for record in cell.records() if "gap" not in record}
            for budget in (budget for budget in budgets if budget in met):
                for number, each in enumerate(self._show(planner, bank, budget)):
                    shown[number].setdefault(cell.arm.name, {})[budget] = each
        pictures = []
        for number, own_shown in enumerate(shown):
            if own_shown:
                query = picked[number]
                path = draw_gallery(query.image, query.question, own_shown, self.folder, f"kept-{number}")
                pictures.append(Picture(path, f"What was kept for: {query.question}"))
        return pictures

    def _show(self, planner: Planner, bank: EncodingBank, budget: float) -> list[Shown]:
        """What a planner keeps for every query of a small bank."""
        encoding = bank.gather(range(len(bank)))
        budgets_B = torch.full((len(encoding),), budget, dtype=torch.float64, device=self.backbone.device)
        answers = self.backbone.answer(encoding, planner.plan(encoding, budgets_B), self.cut)
        rows = []
        for row in range(len(encoding)):
            valid_N = encoding.visual_valid_BN[row].cpu().numpy()
            right = score(answers.texts[row], encoding.answers[row]) > 0.5
            tokens_N = answers.masks.tokens[row].cpu().numpy()[valid_N]
            heads_LH = answers.masks.effective_heads[row].cpu().numpy()
            rows.append(Shown(tokens_N, heads_LH, answers.texts[row], right))
        return rows

    def _commands(self) -> list[str]:
        trained = [command for cell in self.cells if (command := cell.command())]
        return list(dict.fromkeys([command_line(), *trained]))


def trainings(results: Mapping[str, ArmResult]) -> str:
    """How many there were, and how long they took one after the other."""
    seconds = [each.whole for result in results.values() for each in result.converged]
    return f"{len(seconds)}, in all {sum(seconds) / 3600:.2g} hours of training"
