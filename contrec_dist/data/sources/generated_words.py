"""Words of the generated catalogue: per category its name, its product lines and its adjectives."""

BRAND_SYLLABLES = (
    ("Nor", "Vel", "Kar", "Lum", "Tas", "Bri", "Oma", "Zen", "Fal", "Hux", "Mir", "Sol"),
    ("vik", "dora", "tex", "bella", "more", "stone", "line", "wick", "ra", "lux", "field", "nova"),
)

CATEGORIES = (
    (
        "Coffee",
        "Espresso Machine|Coffee Grinder|Milk Frother|Pour Over Kettle|French Press|Coffee Beans",
        "Dark Roast|Barista|Italian|Morning|Arabica|Crema",
    ),
    (
        "Running",
        "Running Shoes|Trail Shorts|Hydration Vest|Compression Socks|Race Belt|Running Jacket",
        "Cushioned|Marathon|Breathable|Reflective|Sprint|Endurance",
    ),
    (
        "Gardening",
        "Pruning Shears|Watering Can|Seed Tray|Garden Trowel|Raised Bed|Compost Bin",
        "Perennial|Rust Proof|Cedar|Tomato|Herb|Greenhouse",
    ),
    (
        "Photography",
        "Camera Tripod|Prime Lens|Camera Bag|Lens Filter|Flash Diffuser|Memory Card",
        "Portrait|Wide Angle|Carbon|Polarizing|Studio|Landscape",
    ),
    (
        "Skin Care",
        "Face Serum|Night Cream|Clay Mask|Sun Lotion|Toner|Eye Gel",
        "Hydrating|Vitamin C|Soothing|Retinol|Aloe|Brightening",
    ),
    (
        "Cycling",
        "Bike Helmet|Road Saddle|Chain Lube|Bike Light|Tire Pump|Handlebar Tape",
        "Aero|Gravel|Tubeless|Commuter|Mountain|Ventilated",
    ),
    (
        "Baking",
        "Cake Pan|Rolling Pin|Piping Set|Stand Mixer|Dough Scraper|Cookie Cutter",
        "Nonstick|Sourdough|Fondant|Silicone|Pastry|Bundt",
    ),
    (
        "Board Games",
        "Strategy Game|Card Game|Dice Set|Puzzle|Party Game|Expansion Pack",
        "Cooperative|Medieval|Deck Building|Trivia|Galactic|Detective",
    ),
    (
        "Camping",
        "Dome Tent|Sleeping Bag|Camp Stove|Headlamp|Trekking Poles|Dry Bag",
        "Ultralight|Four Season|Waterproof|Alpine|Backpacking|Insulated",
    ),
    (
        "Guitar",
        "Guitar Strings|Effects Pedal|Guitar Strap|Tube Amp|Capo|Guitar Picks",
        "Acoustic|Overdrive|Vintage|Phosphor Bronze|Reverb|Fingerstyle",
    ),
    (
        "Aquarium",
        "Canister Filter|Aquarium Heater|Fish Food|Driftwood|LED Hood|Water Test Kit",
        "Tropical|Reef|Freshwater|Planted|Nano|Cichlid",
    ),
    (
        "Yoga",
        "Yoga Mat|Cork Block|Meditation Cushion|Yoga Strap|Yoga Leggings|Bolster",
        "Vinyasa|Natural Rubber|Restorative|Hot|Balanced|Extra Thick",
    ),
    (
        "Computing",
        "Mechanical Keyboard|Gaming Mouse|USB Hub|Monitor Arm|Laptop Stand|Webcam",
        "Wireless|RGB|Ergonomic|Ultrawide|Backlit|Tenkeyless",
    ),
    (
        "Dog",
        "Dog Leash|Chew Toy|Dog Bed|Training Treats|Dog Harness|Slow Feeder",
        "Puppy|Grain Free|Orthopedic|Squeaky|Reflective Nylon|Large Breed",
    ),
    (
        "Painting",
        "Watercolor Set|Canvas Panel|Brush Set|Easel|Acrylic Paint|Sketchbook",
        "Gouache|Cold Press|Sable|Cadmium|Plein Air|Gallery",
    ),
    (
        "Woodworking",
        "Chisel Set|Block Plane|Bar Clamp|Wood Stain|Dovetail Saw|Router Bit",
        "Walnut|Hardwood|Japanese|Bench|Carbide|Dado",
    ),
    (
        "Knitting",
        "Merino Yarn|Circular Needles|Stitch Markers|Yarn Bowl|Crochet Hook|Pattern Book",
        "Chunky|Hand Dyed|Bamboo|Fingering|Cable Knit|Lace",
    ),
    (
        "Fishing",
        "Spinning Reel|Casting Rod|Crankbait|Braided Line|Tackle Box|Fly Box",
        "Bass|Trout|Saltwater|Walleye|Topwater|Ice",
    ),
    (
        "Baby",
        "Swaddle Blanket|Baby Bottle|Teething Ring|Diaper Bag|Baby Monitor|Crib Sheet",
        "Organic Cotton|Newborn|Anti Colic|Toddler|Muslin|Nursery",
    ),
    (
        "Astronomy",
        "Refractor Telescope|Star Chart|Eyepiece|Moon Filter|Equatorial Mount|Binoculars",
        "Celestial|Deep Sky|Planetary|Apochromatic|Stargazing|Lunar",
    ),
)
