"""Every door, by name."""

from __future__ import annotations

from tests.fuzz.case import Door
from tests.fuzz.doors import adapters, headers, models, requests, trainings

DOORS: dict[str, Door] = {
    door.name: door for door in (*headers.DOORS, *adapters.DOORS, *models.DOORS, *trainings.DOORS, *requests.DOORS)
}
