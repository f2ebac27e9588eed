"""The words that `criteria` builds prompts of; all chosen for this library."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split(",")]


def _table(rows: str) -> dict[str, list[str]]:
    """`key: item, item` on each line."""
    pairs = (row.split(":") for row in rows.strip().splitlines())
    return {key.strip(): _phrases(items) for key, items in pairs}


COLOURS = _words("""
    red green blue yellow orange purple pink brown black white grey golden silver turquoise maroon
    beige crimson teal
""")

THINGS = _words("""
    car bicycle chair table cup bowl vase lamp book clock backpack suitcase hat scarf boot balloon
    kite ball candle bottle teapot guitar drum bench ladder bucket basket pillow blanket rug sofa
    mailbox boat truck bus train tent door fence mug plate helmet robot umbrella wheelbarrow piano
    box ribbon jacket sock glove kettle spoon telephone camera keyboard pencil crayon toothbrush
    flowerpot armchair dress shirt towel lantern toaster fan scooter skateboard surfboard canoe
    apple pear cherry tomato pepper flower rose tulip mushroom leaf feather seashell cake cupcake
""")

ANIMALS = _words("""
    cat dog horse cow sheep rabbit fox bear lion tiger elephant giraffe zebra monkey penguin owl
    duck chicken pig goat frog turtle mouse squirrel deer wolf kangaroo camel parrot swan hedgehog
    otter donkey goose peacock butterfly beetle snail crab lizard
""")

IRREGULAR_PLURALS = {
    "sheep": "sheep", "mouse": "mice", "deer": "deer", "goose": "geese", "wolf": "wolves",
    "scarf": "scarves", "leaf": "leaves", "tomato": "tomatoes",
}  # fmt: skip

MATERIALS = _table("""
    wooden: chair, table, bench, spoon, box, boat, door, fence, ladder, bowl, stool, toy train
    metal: chair, bucket, spoon, door, fence, kettle, ladder, box, gate, lamp, robot, bridge
    glass: vase, bottle, bowl, table, door, lamp, marble, jar, teapot, window
    leather: sofa, jacket, boot, suitcase, glove, belt, armchair, saddle, book cover
    ceramic: mug, plate, vase, bowl, teapot, flowerpot, tile, candlestick
    plastic: chair, bottle, cup, toy car, bucket, spoon, comb, duck, box
    stone: bench, wall, bridge, statue, fountain, tower, bowl, lantern
    velvet: curtain, pillow, sofa, dress, ribbon, cape, hat
    woollen: scarf, blanket, hat, sock, glove, jumper, rug
    rubber: ball, boot, tyre, duck, hose, glove
    paper: lantern, boat, kite, bag, crane, plate, cup
    marble: statue, table, floor, fountain, column, bust
    wicker: basket, chair, lampshade, trunk, hat
    fluffy: pillow, rug, towel, cloud, slipper, kitten
    rusty: gate, car, bicycle, key, bucket, anchor
""")

SHAPES = _table("""
    round: table, mirror, clock, window, rug, plate, cake, balloon, pillow, tray
    square: table, mirror, clock, window, rug, plate, cake, box, pillow, tile
    rectangular: table, mirror, window, rug, box, tray, sign, swimming pool, picture frame
    oval: table, mirror, rug, tray, picture frame, swimming pool, platter
    triangular: flag, sign, tile, sail, tent, window, slice of cake
    heart-shaped: box, balloon, pillow, cake, locket, leaf
    star-shaped: balloon, lamp, cushion, tile, badge, paper lantern
    long: table, bench, scarf, ladder, ribbon, boat
    tall: vase, ladder, tower, lamp, candle, hat
    curved: bench, bridge, mirror, sofa, roof
""")

PATTERNS = _table("""
    striped: scarf, pillow, blanket, curtain, shirt, umbrella, rug, mug, sock, tie, beach towel
    spotted: scarf, pillow, dress, umbrella, mug, bow tie, balloon, tablecloth
    checked: shirt, blanket, tablecloth, jacket, skirt, cushion
    flowery: dress, curtain, tablecloth, teapot, hat, armchair, apron
    plain: shirt, curtain, rug, mug, pillow, dress, tie
""")

BINDINGS = (dict.fromkeys(COLOURS, THINGS), MATERIALS, SHAPES, PATTERNS)

NUMBERS = _words("two three four five six seven eight nine ten")

SPATIAL = _phrases("""
    to the left of, to the right of, on the left of, on the right of, above, below, on top of,
    under, next to, beside, near, behind, in front of, far away from, leaning against
""")

PEOPLE = _words("""
    man woman boy girl child teenager chef farmer teacher nurse doctor painter musician dancer
    gardener fisherman firefighter astronaut pilot sailor postman librarian baker carpenter student
    tourist cyclist waiter scientist clown mechanic shepherd photographer grandmother grandfather
""")

LOOKS = _words("""
    young old smiling tall cheerful tired serious curious elegant friendly proud sleepy
    freckled
""")

ACTIONS = _table("""
    reading: book, newspaper, letter, map, comic
    carrying: basket of apples, ladder, sleeping child, stack of books, suitcase, bunch of flowers
    painting: fence, portrait, boat, wall, landscape
    repairing: bicycle, clock, fishing net, roof, radio
    feeding: horse, flock of ducks, kitten, goat, parrot
    riding: bicycle, horse, camel, scooter, donkey
    playing: guitar, violin, drum, flute, accordion
    pouring: cup of tea, glass of milk, bowl of soup, jug of water
    pushing: wheelbarrow, pram, shopping trolley, swing, broken car
    photographing: sunset, waterfall, bride, lion, bridge
    washing: car, dog, window, pile of plates
    cutting: cake, loaf of bread, ribbon, watermelon
    throwing: ball, stick, snowball, paper plane, frisbee
    building: sandcastle, snowman, wall, bookshelf, campfire
    watching: television, football match, eclipse, puppet show
    hugging: teddy bear, dog, tree, pillow
    climbing: tree, ladder, mountain, rope
    drawing: circle, cat, treasure map, rainbow
""")

MEETINGS = _phrases("""
    talking to, shaking hands with, dancing with, waving to, playing chess with, walking with,
    whispering to, arguing with, laughing with, handing a cup to, handing a letter to, helping,
    cooking with, taking a picture of, teaching, following
""")

PLACES = _phrases("""
    on a beach, in a garden, in a kitchen, on a wooden table, in a forest, in a field, by a lake,
    on a city street, in the snow, in a library, on a bridge, at a market, in a park, on a rooftop,
    in a workshop, at a station, in a meadow, on a mountain, in a museum, in an empty room
""")

STYLES = _phrases("""
    a photo of, a watercolour of, an oil painting of, a pencil drawing of, a close-up of,
    a black and white photo of, a cartoon of, a wide shot of
""")

SIGN_PLACES = _phrases("""
    in front of a shop, on a busy street, at a demonstration, in a park, at an airport, on a beach,
    in a classroom, at a bus stop, in the rain, in a stadium, on a stage, at a market, in an office,
    in front of a brick wall, by the sea, in the snow, at a train station, under a bridge,
    on a mountain top, in a kitchen
""")

SIGNS = _phrases("""
    sign, sign, sign, cardboard sign, wooden sign, white sign, poster, placard, banner, chalkboard,
    whiteboard, sheet of paper, card, yellow sign, neon sign, framed sign, large sign, small sign
""")

HOLDING = _phrases("""
    holding, holding, holding up, showing, carrying, raising, pointing at, standing next to
""")

WRITTEN = _phrases("""
    that says, that says, that reads, saying, with the word, with the text
""")

# For signs: common words of three to nine letters.
COMMON_WORDS = _words("""
    able about above accept across action active actor adult advice affair afraid after again
    against agency agent agree ahead airport album alive allow almost alone along already always
    amazing among amount ancient angel angle angry animal answer anyone apart apple area argue arm
    army around arrive arrow artist asleep autumn average avoid awake away baby back bacon badge bag
    bake balance ball banana band bank barn base basic basket bath beach beam bean bear beard beat
    beauty become bed bee before begin behind believe bell belong below belt bench berry best better
    between beyond big bike bill bird birth bitter black blade blanket blind block blood bloom blue
    board boat body bone bonus book boot border born borrow boss bottle bottom bowl box brain branch
    brave bread break breath brick bridge brief bright bring broad brother brown brush bucket budget
    build bunch burn bus busy butter button buy cabin cable cactus cake call calm camera camp canal
    candle candy canvas capital captain car card care carpet carrot carry cart castle cat catch
    cause cave ceiling cellar central century certain chain chair chalk chance change chapter charge
    cheap check cheese cherry chest chicken chief child choice choose circle city claim class clean
    clear clever climb clock close cloth cloud clown club coach coal coast coat coffee coin cold
    collect college come comfort common company compare complete computer concert contact control
    cook cookie cool copper copy corn corner correct cost cotton couch count country couple courage
    course cousin cover cow cream create crew cross crowd crown cry culture cup curious current
    curtain curve custom cute cycle daily damage dance danger dark data date daughter dawn day dead
    deal dear debate decide deep deer degree delay deliver demand dentist depth desert design desk
    detail diamond diary dinner direct dirty discover dish distance divide doctor dog doll dollar
    dolphin done donkey door double doubt down dozen dragon drama draw dream dress drink drive drop
    drum dry duck dust duty eager eagle early earn earth east easy eat echo edge editor effect
    effort egg eight either elbow electric elephant eleven else empty end enemy energy engine enjoy
    enough enter entire equal escape even evening event ever every exact example excited exit expect
    expert explain explore extra eye fabric face fact factory fair faith fall false fame family
    famous fancy far farm fashion fast father fault fear feast feather feed feel fence festival few
    field fight figure fill film final find finger finish fire firm first fish fit five flag flame
    flash flat flight float flood floor flour flow flower fly focus fold follow food foot football
    force forest forever forget fork form forward four fox frame free freedom freeze fresh friend
    frog front frost fruit full fun funny future galaxy game garage garden garlic gate gather gentle
    ghost giant gift giraffe girl give glad glass glove glue goal goat gold good grace grain grand
    grape grass gravity great green greet ground group grow guard guess guest guide guitar habit
    hair half hall hammer hand happen happy hard harvest hat have head health hear heart heat heavy
    height hello help hero hidden high hill history hobby hold hole holiday hollow home honest honey
    hook hope horse hospital host hot hotel hour house huge human humble hundred hungry hunt hurry
    idea image impact include indoor inside invite iron island itself ivory jacket jar jazz jeans
    jelly jewel job join joke journey joy judge juice jump jungle junior just keen keep kettle key
    kick kid kind king kingdom kiss kitchen kite kitten knee knife knock knot know label ladder lady
    lake lamp land language large last late laugh laundry lava law lawn layer lazy lead leader leaf
    learn leather leave lecture left legend lemon length lesson letter level library life lift light
    like limit line lion liquid list listen little live lizard local lock log lonely long look loose
    lost loud love lovely low loyal lucky lunch machine magic magnet mail main major make manage
    mango map marble march margin market mask master match math matter maybe meadow meal mean
    measure meat medal media meet melody melon member memory menu mercy message metal method middle
    midnight mild mile milk million mind mineral minute mirror mist mistake mix model modern moment
    money monkey month moon morning mother motion mountain mouse mouth move movie much mud museum
    mushroom music mystery nail name narrow nation nature near neat neck need needle nephew nest
    never new news next nice night nine noble noise north nose note nothing notice novel now number
    nurse oak object ocean october odd offer office often oil old olive once onion only open opera
    orange orbit orchard order organ origin other outside oven over owl own oxygen paint pair palace
    palm panda panel paper parade parent park parrot part party pass past patch path patient pattern
    pause peace peach pearl pen pencil penguin people pepper perfect person phone photo phrase piano
    pick picnic picture piece pilot pillow pine pink pioneer pipe pizza place plain plan planet
    plant plate play please plenty plum pocket poem point polite pond pony pool poor popular port
    possible postcard pot potato powder power practice praise prepare present pretty price pride
    prince print prize problem promise proof proud public pull pumpkin puppy pure purple purpose
    push puzzle quality quarter queen question quick quiet quilt quite rabbit race radio rail rain
    rainbow raise ranch range rare raven reach read ready real reason recipe record red reflect
    region relax remember repair repeat rescue respect rest result return reward rhythm ribbon rice
    rich ride right ring rise river road roast robot rock rocket roof room root rope rose rough
    round route royal rubber rule run saddle safe sail salad salmon salt same sand sauce save scale
    scarf scene school science score sea search season seat second secret seed sell send sense
    series service seven shade shadow shape share shark sharp sheep shelf shell shelter shift shine
    ship shirt shoe shop short shout show shower shy side sign signal silence silk silver simple
    since sing sister six size skate sketch skill skin skirt sky sleep slice slide slow small smart
    smile smoke smooth snack snail snow soap soccer social sock soft soil soldier solid solution
    some song soon sorry soul sound soup south space spark speak special speed spell spend spider
    spinach spirit spoon sport spot spring square stable staff stage stamp stand star start state
    station statue stay steam steel step stick still stone stop store storm story straight strange
    stranger street strong student studio style subject sudden sugar suit summer sun sunday supper
    support sure surprise swan sweater sweet swim switch symbol system table tail talent talk tall
    target taste taxi tea teach team tell temple ten tennis tent test thank theory thick thin thing
    think third thirsty thread three throw thumb thunder ticket tide tiger time tiny title toast
    today together tomato tomorrow tool tooth top topic torch total touch tour towel tower town toy
    track trade traffic trail train travel treasure tree trick trip trophy trouble truck true
    trumpet trust truth try tulip tunnel turn turtle twelve twenty twin two umbrella uncle under
    union unique unit unity universe until upper urban urgent useful usual vacation valley value
    vanilla vase velvet very victory video view village violet violin visit voice volcano volume
    vote wait wake walk wall wallet walnut wander want warm wash watch water wave wealth wear
    weather week welcome west wet whale wheat wheel where whisper white whole wide wild will willow
    wind window wing winner winter wisdom wise wish with wizard wolf wonder wood wool word work
    world worth wrap write wrong yard year yellow yes yesterday yet young youth zebra zero zone
""")
