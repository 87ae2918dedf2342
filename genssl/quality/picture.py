"""The picture of a quality card: consistency against diversity."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LISTED = 24  # settings, up to which dots bear numbers and a list beside the panels names them


def draw_quality(card: dict[str, Any]) -> Figure:
    """Returns a figure of two panels: label agreement (or retrieval@1) and Frechet distance, both over Vendi score."""
    protocol, (real, standard, own, *others) = card["protocol"], card["rows"]
    consistency = "retrieval@1" if real["label_agreement"] is None else "label_agreement"
    figure = Figure(figsize=(12, 4.8), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    listed = len(others) <= LISTED
    for axes, metric in zip(panels, (consistency, "frechet"), strict=True):
        for number, row in enumerate(others, start=1):
            place = row["vendi_per_source"], row[metric]
            name = f"{number}  {short(row['setting'])}" if listed else "other settings" if number == 1 else None
            axes.scatter(*place, s=150 if listed else 40, c="#4c8bd0", label=name, edgecolors="white", zorder=3)
            if listed:
                axes.annotate(str(number), place, ha="center", va="center", fontsize=6.5, color="white", zorder=4)
        for row, name, colour, marker, size in (
            (own, "the recipe's setting", "#0b2545", "*", 260),
            (standard, "standard augmentations", "#d95f02", "s", 70),
        ):
            axes.scatter(
                row["vendi_per_source"],
                row[metric],
                s=size,
                c=colour,
                marker=marker,
                label=name,
                edgecolors="white",
                zorder=5,
            )
        if real[metric] is not None:
            axes.axhline(real[metric], color="#555", linewidth=1, linestyle="--", label="real images")
        axes.set_xlabel(f"diversity: Vendi score of {protocol['variants_of_a_source']} variants of a source")
        axes.margins(0.08)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"consistency: {consistency.replace('_', ' ')}")
    panels[1].set_ylabel("Frechet distance to other real images")
    entries = panels[0].get_legend_handles_labels()
    named = sorted(zip(*entries, strict=True), key=lambda entry: entry[1][:1].isdigit())  # the numbered ones last
    figure.legend(*zip(*named, strict=True), fontsize=8, loc="outside right center", frameon=False, markerscale=0.7)
    generator = card["generator"]
    figure.suptitle(
        f"{generator['name']} {generator['model']}: {protocol['sources']:,} sources of {protocol['dataset']['name']} "
        f"({protocol['measured_on']}), judged by {protocol['judge']['name']}",
        fontsize=10,
    )
    return figure


def short(setting: str) -> str:
    """Returns a setting's name as tables and pictures have room for it: "steps 2, noise 0.3"."""
    words = {
        "standard augmentations": "standard augm.",
        "num_inference_steps": "steps",
        "embedding_noise": "noise",
        "noise_level": "noise",
        "guidance_scale": "guidance",
    }
    for long, brief in words.items():
        setting = setting.replace(long, brief)
    return setting.replace("_", " ")
