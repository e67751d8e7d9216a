// The dashboard: what the endpoint says, once a second, in the parts of the page.

import { Banner } from "./banner.js";
import { Charts } from "./charts.js";
import { Decisions } from "./decisions.js";
import { byId, choices } from "./dom.js";
import { Drawer } from "./drawer.js";
import { Figures, showDeployment } from "./figures.js";
import { KeyForm } from "./key.js";
import { Link } from "./link.js";
import { Pools } from "./pools.js";
import { Requests } from "./requests.js";
import { Samples } from "./samples.js";
import { offerThemes } from "./themes.js";

const RANGES = [["60", "1 min"], ["300", "5 min"], ["900", "15 min"], ["3600", "1 h"]];
const FIRST_RANGE = "300";

const samples = new Samples();
const drawer = new Drawer();
const parts = {
  banner: new Banner(),
  charts: new Charts(),
  decisions: new Decisions(drawer, samples),
  figures: new Figures(),
  pools: new Pools(),
  requests: new Requests(drawer),
};
let rangeS = Number(FIRST_RANGE);
let latest = null;

function drawCharts() {
  parts.charts.show(samples, latest, parts.decisions.moves(), rangeS);
}

offerThemes();
choices(byId("range"), RANGES, FIRST_RANGE, (value) => {
  rangeS = Number(value);
  drawCharts();
});

const link = new Link({
  history: (page) => samples.add(page),
  state: (state) => {
    latest = state;
    showDeployment(state);
    parts.figures.show(state);
    parts.pools.show(state);
    parts.decisions.show(state);
    parts.requests.show(state);
    drawCharts();
  },
  decisions: (records, isNew) => parts.decisions.add(records, isNew),
  requests: (requests) => parts.requests.add(requests),
  wantsRequests: () => parts.requests.isWanted,
  trouble: (trouble) => {
    keyForm.tell(trouble);
    parts.banner.tell(trouble);
  },
});
const keyForm = new KeyForm(() => link.wake());
link.wake();
