// The whole web client Hydrogen, as its own start page puts it together.

import { FeatureSet, Platform, RootViewModel, createNavigation, createRouter } from "hydrogen-view-sdk";
import "hydrogen-view-sdk/style.css";

const assetPaths = {
    downloadSandbox: "assets/download-sandbox.html",
    worker: "assets/main.js",
    olm: { wasm: "assets/olm.wasm", legacyBundle: "assets/olm_legacy.js", wasmBundle: "assets/olm.js" },
    // It puts the access token to the requests for pictures.
    serviceWorker: "sw.js",
};
const platform = new Platform({ container: document.body, assetPaths, config: { defaultHomeServer: "" } });
await platform.init();
const navigation = createNavigation();
platform.setNavigation(navigation);
const urlRouter = createRouter({ navigation, history: platform.history });
urlRouter.attach();
const features = await FeatureSet.load(platform.settingsStorage);
const root = new RootViewModel({ platform, urlRouter, navigation, features });
await root.load();
platform.createAndMountRootView(root);
